"""Code that a recipe or a checkpoint names does not run without `--trust-code`, and is named before it runs."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmtrain import trust
from llmtrain.checkpoint import manifest
from llmtrain.conversations.preprocessing import resolve
from llmtrain.errors import UserError
from llmtrain.hf_model.config import HFConfig
from llmtrain.prep.stages.functions import resolve as resolve_stage
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer
from llmtrain.user_code import run_code_paths


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported; nobody trusts it yet."""
    monkeypatch.delenv("LLMTRAIN_TRUST_CODE", raising=False)
    monkeypatch.delenv("LLMTRAIN_TRUSTED_CODE_SAID", raising=False)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil_module.py"
    file.write_text("from pathlib import Path\nPath('mark').touch()\ndef f(row):\n    return row\n")
    yield file
    sys.modules.pop("evil_module", None)


def test_files_of_code_paths_run_with_trust_only(
    evil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"code_paths: .*evil_module\.py.*--trust-code"):
        run_code_paths([str(evil)])
    assert not Path("mark").exists()
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")
    run_code_paths([str(evil)])
    assert Path("mark").exists()
    assert hashlib.sha256(evil.read_bytes()).hexdigest()[:16] in capsys.readouterr().err
    run_code_paths([str(evil)])
    assert not capsys.readouterr().err  # said once


def test_functions_of_modules_need_trust(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ask in (lambda: resolve("evil_module:f"), lambda: resolve("evil_module.f")):
        with pytest.raises(UserError, match=r"preprocessing_fn: evil_module.*evil_module\.py.*--trust-code"):
            ask()
    with pytest.raises(UserError, match=r"stages\.function\.function: evil_module:f.*--trust-code"):
        resolve_stage("function", "evil_module:f")
    assert not Path("mark").exists()
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")
    assert resolve("evil_module:f")({"prompt": "a"}) == {"prompt": "a"}
    assert resolve_stage("function", "evil_module:f")


def test_what_is_registered_needs_no_trust_and_is_no_way_around_it(evil: Path) -> None:
    assert resolve("databricks-dolly-15k")
    assert resolve({"prompt": "q", "response": "a"})
    for name in ("llmtrain.user_code:import_module", "subprocess:Popen", "llmtrain.conversations.adapters:Path"):
        with pytest.raises(UserError, match=r"--trust-code|has no function|is no function of"):
            resolve(name)


def test_code_of_a_tokenizer_or_model_is_not_run(evil: Path) -> None:
    folder = evil.parent / "model"
    folder.mkdir()
    (folder / "mine.py").write_text("open('mark', 'w')\n")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}})
    )
    with pytest.raises(UserError, match=r"tokenizer\.kwargs\.trust_remote_code: .*mine\.py \(sha256.*--trust-code"):
        load_tokenizer(TokenizerConfig(name=str(folder), kwargs={"trust_remote_code": 1}))
    from llmtrain.hf_model.load import read_config

    cfg = HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(folder), trust_remote_code=True)
    with pytest.raises(UserError, match=r"model\.trust_remote_code: .*mine\.py \(sha256.*--trust-code"):
        read_config(cfg)
    assert not Path("mark").exists()


def test_a_config_cannot_have_a_kernel_fetched_from_the_hub(evil: Path) -> None:
    from llmtrain.hf_model.load import read_config

    folder = evil.parent / "model"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 32, "attn_implementation": "somebody/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"attn_implementation.*somebody/kernel.*--trust-code"):
        read_config(HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(folder)))


def test_a_config_inside_a_config_inside_a_config_cannot_either(evil: Path) -> None:
    from types import SimpleNamespace

    from llmtrain.hf_model.load import _refuse_kernels

    deep = SimpleNamespace(_attn_implementation="somebody/kernel")
    outer = SimpleNamespace(_attn_implementation=None, text=SimpleNamespace(_attn_implementation="sdpa", talker=deep))
    outer.text.circle = outer
    with pytest.raises(UserError, match=r"attn_implementation.*somebody/kernel.*--trust-code"):
        _refuse_kernels(outer, "a")


def test_a_checkpoint_s_own_recipe_is_not_trusted(evil: Path) -> None:
    """The known gap: a stranger's checkpoint whose manifest says trust_remote_code."""
    from llmtrain.hf_model.source import open_hf

    folder = evil.parent / "model"
    folder.mkdir()
    (folder / "mine.py").write_text("open('mark', 'w')\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}))
    checkpoint = evil.parent / "checkpoint"
    checkpoint.mkdir()
    torch.save({"state": {"model": {"model.head.weight": torch.zeros(1)}}}, checkpoint / "full.pt")
    model = {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(folder), "trust_remote_code": True}
    manifest.write(
        checkpoint,
        kind="full",
        step=1,
        tokens=1,
        files={"full.pt": manifest.file_entry(checkpoint / "full.pt")},
        recipe={"model": model},
        tokenizer_fingerprint=None,
    )
    with pytest.raises(UserError, match=r"model\.trust_remote_code: .*mine\.py \(sha256.*--trust-code"):
        open_hf(checkpoint)
    assert not Path("mark").exists()


def test_pickles_in_shards_need_trust_though_the_recipe_accepts_them(
    evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe is a stranger's, too: what it accepts is nobody's word."""
    from streaming import MDSWriter

    from llmtrain.data.finetuning.config import FinetuningStreamConfig
    from llmtrain.data.finetuning.mds_rows import MDSRows

    class Mark:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (Path("mark"),)

    folder = evil.parent / "shards"
    with MDSWriter(out=str(folder), columns={"prompt": "str", "response": "pkl"}) as writer:
        writer.write({"prompt": "a", "response": Mark()})
    source = FinetuningStreamConfig(local=str(folder))
    with pytest.raises(UserError, match=r"allow_unsafe_types: .*shards.*--trust-code"):
        list(MDSRows(source, "", evil.parent / "cache", True))
    assert not Path("mark").exists()
    with pytest.raises(UserError, match="unsafe type"):
        list(MDSRows(source, "", evil.parent / "cache", False))
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")
    assert len(list(MDSRows(source, "", evil.parent / "cache", True))) == 1
    assert Path("mark").exists()  # it is what it seems to be


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("pandas", {"data_files": "evil.pkl"}), ("folder", {"trust_remote_code": True})],
)
def test_data_sets_bring_no_code_with_or_without_trust(
    name: str, arguments: dict[str, Any], evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pandas` is a builder of datasets that unpickles files, in releases below the newest."""
    import datasets

    from llmtrain.conversations.hf_rows import hf_rows
    from llmtrain.evaluation.icl.config import ICLTaskConfig
    from llmtrain.evaluation.icl.rows import read_rows
    from llmtrain.prep.config import SourceConfig
    from llmtrain.prep.readers.hugging_face import n_shards

    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Path("mark").touch())
    task = {"label": "a", "icl_task_type": "language_modeling", "num_fewshot": [0], "dataset_uri": f"hf://{name}"}
    readers = [lambda: read_rows(ICLTaskConfig(**task, hf_loading_vars=arguments))]
    if name == "pandas":  # the other two refuse the key in the recipe
        readers.append(lambda: list(hf_rows(name, hf_kwargs=arguments)))
        readers.append(lambda: n_shards(SourceConfig(name="a", hf_name=name, hf_kwargs=arguments)))
    for read in readers:
        with pytest.raises(UserError, match="no flag changes that"):
            read()
    assert not Path("mark").exists()


def test_scripts_of_data_sets_are_switched_off_for_old_releases(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those below 2.20 run them unasked."""
    import datasets

    from llmtrain.foreign_datasets import load_dataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", True, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.config.HF_DATASETS_TRUST_REMOTE_CODE)
    assert load_dataset("a") is False


@pytest.mark.parametrize("value", [None, 0, False, ""])
def test_a_tokenizer_is_never_opened_with_a_question_at_the_terminal(
    value: object, evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def opened(name: str, **kwargs: Any) -> None:
        raise OSError(str(kwargs["trust_remote_code"]))

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", opened)
    with pytest.raises(UserError, match="cannot be opened: False"):
        load_tokenizer(TokenizerConfig(name="a", kwargs={"trust_remote_code": value}))


@pytest.mark.parametrize(
    ("block", "needs"),
    [
        ({"code_paths": ["a.py", "b.py"]}, ["code_paths.0: a.py", "code_paths.1: b.py"]),
        ({"model": {"trust_remote_code": True}}, ["model.trust_remote_code: True"]),
        ({"tokenizer": {"kwargs": {"trust_remote_code": "yes"}}}, ["tokenizer.kwargs.trust_remote_code: yes"]),
        (
            {"train_loader": {"dataset": {"streams": {"a": {"preprocessing_fn": "m:f"}}}}},
            ["train_loader.dataset.streams.a.preprocessing_fn: m:f"],
        ),
        ({"stages": [{"name": "language", "function": "m:f"}]}, ["stages.0.function: m:f"]),
        ({"compile_config": {"options": {"cpp.cxx": "/tmp/x"}}}, ["compile_config.options.cpp.cxx: /tmp/x"]),
        (
            {"train_loader": {"dataset": {"allow_unsafe_types": True}}},
            ["train_loader.dataset.allow_unsafe_types: True"],
        ),
        ({"harness": {"confirm_run_unsafe_code": True}}, ["harness.confirm_run_unsafe_code: True"]),
        ({"compile_config": {"options": {"max_autotune": True}}}, []),
        ({"train_loader": {"dataset": {"preprocessing_fn": "databricks-dolly-15k"}}}, []),
        ({"train_loader": {"dataset": {"preprocessing_fn": {"prompt": "a", "response": "b"}}}}, []),
        ({"code_paths": None, "model": {"trust_remote_code": False}}, []),
    ],
)
def test_what_a_recipe_would_need(block: dict[str, Any], needs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMTRAIN_TRUST_CODE", raising=False)
    found = trust.needed(block)
    assert [line.partition(" (")[0] for line in found] == needs
    if needs:
        with pytest.raises(UserError, match="--trust-code"):
            trust.require_all(block)
    else:
        trust.require_all(block)


def test_the_flag_is_taken_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "0")
    assert not trust.trusted()
    assert trust.take_flag(["a.yaml", "b=1", "--trust-code"]) == ["a.yaml", "b=1"]
    assert trust.trusted()


@pytest.mark.parametrize("command", ["check", "train"])
def test_commands_refuse_and_check_tells(command: str, evil: Path, repository: Path) -> None:
    recipe = evil.parent / "recipe.yaml"
    content = yaml.safe_load((repository / "yamls" / "mpt-tiny.yaml").read_text())
    recipe.write_text(yaml.safe_dump({**content, "code_paths": [str(evil)]}))
    environment = {key: value for key, value in os.environ.items() if key != "LLMTRAIN_TRUST_CODE"}
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", "check", str(recipe)]
        if command == "check"
        else [sys.executable, "-m", "llmtrain.training.command", str(recipe)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if command == "check":
        assert f"# needs --trust-code: code_paths.0: {evil}" in done.stdout, done.stderr
    else:
        assert done.returncode == 2
        assert f"code_paths.0: {evil}" in done.stderr
        assert "--trust-code" in done.stderr
        assert "Traceback" not in done.stderr
    assert not Path("mark").exists()
