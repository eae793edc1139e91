"""Faults: a layer that gives NaN, a backward pass that does, and a loss that jumps."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.faults import Stopwatch, observe
from llmtrain.testing.launch import Finished, Run
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.sabotage import sabotage

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LAYER = "model.transformer.blocks.1.attn.out_proj"


def start(corpus: TinyCorpus, folder: Path, code: Path, **changes: Any) -> tuple[Run, Stopwatch]:
    """A run of two ranks that has finished step 5; the fault comes with step 6."""
    recipe = tiny_recipe(folder / "run.yaml", corpus, code_paths=[str(code)], eval_interval="100ba", **changes)
    running = Run(recipe, ["--trust-code"], ranks=2, cwd=folder)
    running.wait_for("step 5 ")
    return running, Stopwatch()


def stopped_with_report(running: Run, watch: Stopwatch) -> tuple[Finished, dict[str, Any], float, str]:
    """The run, its report, and when and how it was told."""
    running.wait_for("bad step  ")
    detected = watch.seconds()
    finished = running.wait()
    assert finished.codes == (3, 3), finished.output
    report = json.loads((finished.folder / "bad_steps/step-6.json").read_text())
    message = finished.output[finished.output.index("bad step  ") :].split("\n            the full report")[0]
    latest = finished.folder / "checkpoints/latest"
    assert latest.resolve().name == "ep0-ba4"
    assert "Traceback" not in finished.output
    return finished, report, detected, " ".join(message.split())


def test_nan_in_one_layer_of_one_rank(corpus: TinyCorpus, tmp_path: Path) -> None:
    code = sabotage(tmp_path / "code.py", "output", 6, module=LAYER, rank=1, micro_batch=2)
    finished, report, detected, message = stopped_with_report(*start(corpus, tmp_path, code))
    assert message.startswith("bad step step 6: the loss is not finite rank 1, micro-batch 2 of 2: loss nan, samples ")
    assert f"first in {LAYER} (forward pass, rank 1, micro-batch 2)" in message
    (bad,) = report["micro_batches"]
    assert (bad["rank"], bad["number"], bad["loss"]) == (1, 2, "nan")
    assert [len(row) for row in bad["samples"]] == [1, 1]
    assert list(report["culprits"]) == ["1"]
    assert report["culprits"]["1"]["module"] == LAYER
    assert report["last_checkpoint"] == "ep0-ba4"
    assert set(report["gradient_norms_by_layer"].values()) == {"nan"}  # FSDP adds up over ranks
    assert "the last checkpoint is ep0-ba4, before this step" in finished.output
    observe(
        "NaN in one layer",
        "stopped before the update (exit code 3); report names rank, samples and module",
        run=finished.folder,
        detected=detected,
        recovered=None,
        message=message,
    )


@pytest.mark.parametrize(
    ("sharding", "changes"),
    [
        pytest.param("full", {}, marks=pytest.mark.long),
        pytest.param("checkpointed", {"activation_checkpointing": True}, marks=pytest.mark.long),
        pytest.param("ddp", {"sharding_strategy": "NO_SHARD"}, marks=pytest.mark.long),
        pytest.param("compiled", {}, marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nan_in_the_backward_pass_only(
    corpus: TinyCorpus, tmp_path: Path, sharding: str, changes: dict[str, Any]
) -> None:
    up_proj = "model.transformer.blocks.1.ffn.up_proj"
    code = sabotage(tmp_path / "code.py", "gradient", 6, module=up_proj, rank=1, micro_batch=1)
    settings: dict[str, Any] = {"fsdp_config": {"sharding_strategy": "FULL_SHARD", **changes}}
    if sharding == "compiled":
        settings["compile_config"] = {"backend": "eager"}
        # A hook inside of what was compiled is not called: the sabotage has to be around it.
        up_proj = "model.transformer.blocks.1"
        code = sabotage(tmp_path / "code.py", "gradient", 6, module=up_proj, rank=1, micro_batch=1)
    finished, report, detected, message = stopped_with_report(*start(corpus, tmp_path, code, **settings))
    assert "step 6: the loss is finite, and the gradient is not" in message
    assert (report["searched"], list(report["culprits"])) == (1, ["1"])
    assert report["culprits"]["1"]["phase"] == "backward"
    assert up_proj in report["culprits"]["1"]["what"]
    assert len(report["micro_batches"]) == 4
    norms = report["gradient_norms_by_layer"]
    assert norms["model.transformer.blocks.0"] == "nan"
    assert isinstance(norms["model.transformer.norm_f"], float)
    if sharding == "full":
        observe(
            "NaN in the backward pass only",
            "stopped before the update (exit code 3); the loss was finite",
            run=finished.folder,
            detected=detected,
            recovered=None,
            message=message,
        )


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"compile_config": {"backend": "eager"}}, {"fsdp_config": None}], ids=str)
def test_nan_in_the_forward_pass_of_other_kinds_of_models(
    corpus: TinyCorpus, tmp_path: Path, settings: dict[str, Any]
) -> None:
    module = "model.transformer.blocks.1"
    code = sabotage(tmp_path / "code.py", "output", 6, module=module, rank=0, micro_batch=1)
    _, report, _, _ = stopped_with_report(*start(corpus, tmp_path, code, **settings))
    assert {rank: found["module"] for rank, found in report["culprits"].items()} == {"0": module}


def test_loss_spike(corpus: TinyCorpus, tmp_path: Path) -> None:
    code = sabotage(tmp_path / "code.py", "loss", 6, factor=4.0)
    cfg = {"window": 4, "threshold": 30, "skip_before": 1, "skip_after": 1}
    running, watch = start(corpus, tmp_path, code, bad_steps={"loss_spike": cfg})
    running.wait_for("going back to ep0-ba4, leaving out steps 5-7")
    detected = watch.seconds()
    running.wait_for("step 8 ")
    recovered = watch.seconds()
    finished = running.wait()
    assert finished.code == 0, finished.output
    losses = finished.metrics("loss/train/total")
    assert losses[5] > 20 > losses[4] > losses[11]
    line = next(line for line in finished.output.splitlines() if line.startswith("spike "))
    assert line.startswith("spike       step 6: loss 2")
    observe(
        "loss spike",
        "went back to the checkpoint before it, left the steps around it out, trained on",
        run=finished.folder,
        detected=detected,
        recovered=recovered,
        message=line,
    )
