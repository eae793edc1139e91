"""What an export replaces, and what it leaves alone because others have put it there."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.hugging_face import read_hf_folder, write_hf_folder
from llmtrain.checkpoint.staging import move_into_place, staging
from llmtrain.errors import UserError
from llmtrain.model.mpt import MPT
from llmtrain.training.background_export import remove_half_written


def test_files_of_others_are_not_deleted_with_an_export(run, tmp_path: Path) -> None:
    run.save()
    out = tmp_path / "out"
    export(run.folder, out)
    (out / "model.gguf").write_text("of somebody")
    (out / ".git").mkdir()
    with pytest.raises(UserError, match=r"holds \.git, model\.gguf, which no export has written"):
        export(run.folder, out, dtype="bfloat16", overwrite=True)
    assert (out / "model.gguf").read_text() == "of somebody"
    (out / "model.gguf").unlink()
    (out / ".git").rmdir()
    assert export(run.folder, out, dtype="bfloat16", overwrite=True).dtype == "bfloat16"


def test_the_same_export_is_one_with_the_same_options_and_all_its_files(run, tmp_path: Path) -> None:
    run.save()
    out = tmp_path / "out"
    export(run.folder, out, max_shard_size="1GB")
    assert export(run.folder, out, max_shard_size="1000MB").done_before
    for other in ({"license": "mit"}, {"max_shard_size": "100KB"}, {"with_code": True}):
        with pytest.raises(UserError, match="--overwrite"):
            export(run.folder, out, **{"max_shard_size": "1GB", **other})
    with (out / "model.safetensors").open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="--overwrite"):
        export(run.folder, out, max_shard_size="1GB")
    assert not export(run.folder, out, max_shard_size="1GB", overwrite=True).done_before


def test_a_folder_is_not_exported_onto_itself(run, tmp_path: Path) -> None:
    run.save()
    out = tmp_path / "out"
    export(run.folder, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is or holds what is exported"):
        export(out, out, dtype="bfloat16", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before


def test_the_folder_that_we_are_in(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the folder that you are in"):
        export(run.folder, Path())
    with pytest.raises(UserError, match="is a mount point"):
        export(run.folder, Path("/proc"))
    assert list(Path().iterdir()) == []


def test_a_single_file_counts_before_an_index_as_in_transformers(run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run.save()
    folder = tmp_path / "two"
    export(run.folder, folder)
    config, _ = read_hf_folder(folder)
    torch.manual_seed(1)
    earlier = MPT(config, device="cpu").state_dict()
    write_hf_folder(folder, config, earlier, dtype="float32", tokenizer=None, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    name = "transformer.wte.weight"
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    assert torch.equal(read_hf_folder(folder)[1][name], theirs)
    assert not torch.equal(theirs, earlier[name])


def test_keys_that_transformers_has_not_and_configs_that_are_none(run, tmp_path: Path) -> None:
    run.save()
    out = tmp_path / "out"
    export(run.folder, out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, "norm_eps": 0.1}))
    assert read_hf_folder(out)[0].norm_eps == content["layer_norm_epsilon"]
    for strange in ({"architectures": 5}, {"attn_config": [1]}):
        (out / "config.json").write_text(json.dumps(content | strange))
        with pytest.raises(UserError, match="expected a list in `architectures`"):
            read_hf_folder(out)


def test_an_interruption_between_the_two_renames_brings_the_old_one_back(tmp_path: Path) -> None:
    target, hidden = tmp_path / "out", tmp_path / ".out.exporting-1"
    target.mkdir()
    (target / "a").write_text("old")
    hidden.mkdir()

    class Interrupted(type(tmp_path)):  # type: ignore[misc]
        def rename(self, target: Path) -> Path:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move_into_place(Interrupted(hidden / "new"), target, hidden / "old")
    assert (target / "a").read_text() == "old"
    target.rename(hidden / "old")  # and where the process was killed there
    remove_half_written(target)
    assert (target / "a").read_text() == "old"
    assert not hidden.exists()


def end_in_the_middle(target: Path) -> None:
    with staging(target, "exporting") as folder:
        (folder / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_process_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            end_in_the_middle(tmp_path / "out")
        assert ended.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_place_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not made: .*/proc/none"), staging(tmp_path / "out", "exporting"):
        Path("/proc/none").mkdir()
    with pytest.raises(UserError, match="cannot be written"), staging(tmp_path / "out", "exporting") as folder:
        (folder / "a" / "b").write_text("x")


def test_a_tokenizer_that_names_code_or_a_newer_class(run, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run.save()
    file = run.folder / "tokenizer" / "tokenizer_config.json"
    content = json.loads(file.read_text())
    end = AutoTokenizer.from_pretrained(file.parent).eos_token
    strange = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.MineFast"]}}
    for number, change in enumerate(({"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}, strange)):
        file.write_text(json.dumps(content | change))
        out = tmp_path / f"out{number}"
        export(run.folder, out)
        written = json.loads((out / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not {"auto_map", "backend"} & written.keys()
        assert AutoTokenizer.from_pretrained(out).eos_token == end


def test_code_of_a_tokenizer_that_only_the_checkpoint_itself_trusts(run, tmp_path: Path) -> None:
    path, _ = run.save()
    mark = tmp_path / "mark"
    evil = tmp_path / "evil"
    shutil.copytree(run.tokenizer, evil)
    content = json.loads((evil / "tokenizer_config.json").read_text())
    content |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.MineFast"]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(content))
    (evil / "mine.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as MineFast\n"
    )
    sealed = json.loads((path / "manifest.json").read_text())
    manifest.write(
        path,
        kind=sealed["kind"],
        step=3,
        tokens=0,
        files={f.name: manifest.file_entry(f) for f in path.iterdir() if f.name != "manifest.json"},
        recipe=sealed["recipe"] | {"tokenizer": {"name": str(evil), "kwargs": {"trust_remote_code": True}}},
        tokenizer_fingerprint=None,
    )
    shutil.rmtree(run.folder / "tokenizer")  # the run's own would be taken
    with pytest.raises(UserError, match="--recipe"):
        export(run.folder, tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
