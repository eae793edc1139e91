"""Exports beside real training: the weights of their step, in time, and without changing or stopping the run."""

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.read import read_weights
from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.checkpoint.source import open_source
from llmtrain.errors import UserError
from llmtrain.hf_model.source import open_hf
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Run, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training.background_export import BackgroundExport
from llmtrain.training.export_place import ExportPlace
from tests.hf_model.conftest import save_model

LOSS = "loss/train/total"
LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}
SECRET = "hf_plantedsecret"


def recipe_of(path: Path, corpus: TinyCorpus, exports: dict[str, Any] | None = None, **changes: Any) -> Path:
    settings = {"save_folder": "runs/{run_name}", "save_interval": "4ba", "precision": "bfloat16", **(exports or {})}
    quick: dict[str, Any] = {"eval_loader": None, "eval_interval": None, "max_duration": "6ba"}
    return tiny_recipe(path, corpus, **{**quick, "callbacks": {"hf_checkpointer": settings}, **changes})


def assert_weights_of_step(run: Path, step: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """The export is, bit for bit, the checkpoint of the same step in the export's dtype."""
    (checkpoint,) = (run / "checkpoints").glob(f"ep*-ba{step}")
    _, wanted = read_weights(checkpoint)
    found = open_source(run / "huggingface" / f"ba{step}").weights
    assert set(found) == set(wanted)
    for name in wanted:
        assert found.dtype(name) == dtype
        assert torch.equal(found[name], wanted[name].to(dtype)), name


def left_behind(cwd: Path) -> list[str]:
    """Hidden folders of exports, and exporting processes that were started from here."""
    found = [str(path) for path in cwd.rglob(".*exporting*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"export_process" in (process / "cmdline").read_bytes() and (process / "cwd").readlink() == cwd:
                found.append(process.name)
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
def test_a_sharded_run_exports_and_outlives_an_export_that_fails(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path / "x.yaml", corpus, {"push": str(tmp_path / "elsewhere")}, metadata={"license": "mit", "token": SECRET}
    )
    taken = tmp_path / "runs" / "x" / "huggingface" / "ba6"
    taken.mkdir(parents=True)
    (taken / "thesis.txt").write_text("x")
    run = launch(recipe, ranks=2, cwd=tmp_path)
    assert run.codes[0] == 1, run.output
    assert len(run.metrics(LOSS)) == 6
    # The end of the run falls between intervals: it is exported, or here refused, without harm to anything.
    assert "FAILED; training goes on" in run.output
    assert "ba6: holds other files and is no earlier export" in run.output
    assert "1 export(s) failed (the training itself is complete" in run.output
    assert (taken / "thesis.txt").read_text() == "x"
    assert (run.folder / "checkpoints" / "ep0-ba6" / "manifest.json").is_file()
    assert "last mile   saved, exported (mpt, bfloat16)" in run.output
    assert "training waited" in run.output
    assert_weights_of_step(run.folder, 4)
    card = ModelCard((run.folder / "huggingface" / "ba4" / "README.md").read_text())
    assert card.data.license == "mit"
    assert "tokens seen: 2,048" in card.content
    assert SECRET not in card.content
    assert (tmp_path / "elsewhere" / "ba4" / "config.json").is_file()
    assert '"source": "x/ep0-ba4"' in (tmp_path / "elsewhere" / "ba4" / "llmtrain_export.json").read_text()
    assert "exports     each takes 0.00 GB of memory on rank 0 (" in run.output
    assert left_behind(tmp_path) == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
def test_a_stop_in_the_middle_of_an_export(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "x.yaml", corpus, max_duration="12ba")
    plain = launch(
        recipe_of(tmp_path / "plain.yaml", corpus, max_duration="12ba", callbacks=None), ranks=2, cwd=tmp_path
    )
    running = Run(recipe, ranks=2, cwd=tmp_path)
    running.wait_for("ep0-ba4  (")  # the checkpoint is there, the export has only begun
    running.send(signal.SIGTERM)
    stopped = running.wait()
    assert stopped.code == 143, stopped.output
    assert not (stopped.folder / "huggingface" / "ba4").exists()
    assert left_behind(tmp_path) == []
    assert "was stopped; a resumed run makes it up" in stopped.output
    again = launch(recipe, ranks=2, cwd=tmp_path)
    assert again.code == 0, again.output
    for step in (4, 8, 12):
        assert_weights_of_step(again.folder, step)
    assert again.metrics(LOSS) == plain.metrics(LOSS)  # dropout included: no random state was touched
    # A finished run whose last export is gone makes it again, and nothing else.
    before = (again.folder / "huggingface" / "ba8").stat().st_ino
    for file in (again.folder / "huggingface" / "ba12").iterdir():
        file.unlink()
    (again.folder / "huggingface" / "ba12").rmdir()
    assert launch(recipe, ranks=2, cwd=tmp_path).code == 0
    assert_weights_of_step(again.folder, 12)
    assert (again.folder / "huggingface" / "ba8").stat().st_ino == before


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
def test_what_a_run_before_it_exported(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "x.yaml", corpus, {"overwrite": False})
    first = launch(recipe, ranks=1, cwd=tmp_path)
    assert first.code == 0, first.output
    # A run that goes on from step 4 comes to step 6 with the same weights: that export is left as it is.
    inode = (first.folder / "huggingface" / "ba6").stat().st_ino
    for path in (first.folder / "checkpoints" / "ep0-ba6").iterdir():
        path.unlink()
    (first.folder / "checkpoints" / "ep0-ba6").rmdir()
    again = launch(recipe, ranks=1, cwd=tmp_path)
    assert again.code == 0, again.output
    assert "ba6  is there already" in again.output
    assert (first.folder / "huggingface" / "ba6").stat().st_ino == inode
    anew = launch(recipe, ["save_overwrite=true", "autoresume=false"], ranks=1, cwd=tmp_path)
    assert anew.code == 2
    assert "holds exports of an earlier run (ba4, ba6)" in anew.output


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
def test_models_of_transformers(corpus: TinyCorpus, tmp_path: Path, peft: dict[str, Any] | None) -> None:
    save_model(tmp_path / "llama", "llama", vocab_size=500)
    block = {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(tmp_path / "llama")}
    recipe = recipe_of(
        tmp_path / "x.yaml",
        corpus,
        {"precision": "float32", "save_interval": "3ba"},
        model={**block, **({"peft_config": peft} if peft else {})},
        max_duration="3ba",
    )
    run = launch(recipe, ranks=2, cwd=tmp_path)
    assert run.code == 0, run.output
    export(run.folder, tmp_path / "afterwards")
    found, wanted = (open_hf(place) for place in (run.folder / "huggingface" / "ba3", tmp_path / "afterwards"))
    assert found is not None
    assert wanted is not None
    theirs = wanted.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in found.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.gloo_training
def test_what_cannot_work_is_said_before_the_first_step(corpus: TinyCorpus, tmp_path: Path) -> None:
    model = {"name": "mpt_causal_lm", "d_model": 48, "n_heads": 3, "n_layers": 2, "vocab_size": corpus.vocab_size}
    model |= {"no_bias": True, "attn_config": {"alibi": True, "alibi_bias_max": 16}}
    run = launch(recipe_of(tmp_path / "x.yaml", corpus, model=model), ranks=1, cwd=tmp_path)
    assert run.code == 2
    assert "alibi_bias_max: 16" in run.output
    assert "callbacks.hf_checkpointer.with_code: true" in run.output
    assert not (run.folder / "metrics.jsonl").exists()
    (tmp_path / "file").write_text("x")
    run = launch(recipe_of(tmp_path / "y.yaml", corpus, {"save_folder": "file"}), ranks=1, cwd=tmp_path)
    assert run.code == 2
    assert "callbacks.hf_checkpointer.save_folder: exports cannot be written to file/huggingface" in run.output


class TestPlaces:
    def place(self, save_folder: str, push: str | None = None) -> ExportPlace:
        return ExportPlace.of(save_folder, "ba{batch}", push, "mine", Path("runs/mine"))

    def test_a_folder_and_where_it_is_copied_to(self) -> None:
        place = self.place("runs/{run_name}/checkpoints", "s3://bucket/{run_name}/")
        assert (place.folder, place.keep) == (Path("runs/mine/checkpoints/huggingface"), True)
        assert place.destinations("ba4") == ["s3://bucket/mine/ba4"]

    def test_a_url_is_a_place_to_send_to(self) -> None:
        place = self.place("s3://bucket/{run_name}")
        assert (place.folder, place.keep) == (Path("runs/mine/huggingface"), False)
        assert place.destinations("ba4") == ["s3://bucket/mine/huggingface/ba4"]
        assert self.place("hf://me/model").destinations("ba4") == ["hf://me/model"]

    def test_what_names_no_place(self) -> None:
        for push in ("", "s3://", "/"):
            with pytest.raises(UserError, match=r"hf_checkpointer\.push: .* names no place"):
                self.place("runs", push)
        with pytest.raises(UserError, match=r"hf_checkpointer\.save_folder: .* names no place"):
            self.place("s3://")


def test_a_snapshot_is_read_as_it_was_filled(tmp_path: Path) -> None:
    from llmtrain.checkpoint.unpickle import load_full

    wanted = {"model.a": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(5, dtype=torch.bfloat16)}
    shapes = {name: (value.shape, value.dtype) for name, value in wanted.items()}
    with Snapshot(tmp_path / "checkpoints" / "ep0-ba1", shapes) as snapshot:
        for name, value in wanted.items():
            snapshot.tensors[name].copy_(value)
        found = load_full(tmp_path / "checkpoints" / "ep0-ba1" / "full.pt")["state"]["model"]
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        if snapshot.inherited:  # no byte of it is on the disk
            assert str((tmp_path / "checkpoints" / "ep0-ba1" / "full.pt").readlink()).startswith("/proc/self/fd/")


def test_an_export_that_stands_still_is_given_up() -> None:
    background = BackgroundExport()
    background._process = subprocess.Popen(["sleep", "100"])
    assert not background.ended(0.1)
    background.give_up("ba4: not done after 120 minutes of waiting")
    assert background.ended()
    assert background.answer().problem == "ba4: not done after 120 minutes of waiting"


def test_an_export_whose_files_were_cleaned_up_by_others() -> None:
    background = BackgroundExport()
    background._process = subprocess.Popen(["false"])
    assert background.ended(10)
    shutil.rmtree(background._folder)
    assert background.answer().problem == "the exporting process ended without an answer (exit code 1)"
