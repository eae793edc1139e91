"""Bad steps in real runs of two ranks: what is left out is exactly one step, and a kill changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.sabotage import sabotage
from llmtrain.testing.state import read_state, same_state
from llmtrain.training.loss_curve import draw_loss_curve

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS, SKIPPED = "loss/train/total", "step/skipped"
BLOCK = "model.transformer.blocks.1"
REWIND: dict[str, Any] = {
    "max_duration": "16ba",
    "save_interval": "3ba",
    "bad_steps": {
        "loss_spike": {"window": 5, "threshold": 30, "patience": 2, "skip_before": 1, "skip_after": 1, "max_rewinds": 1}
    },
}
WITHOUT = """
from llmtrain.training.bad_steps import BadSteps

BadSteps.decide = lambda self, state, logger: None
"""
LEAVES_OUT = """
from composer import Trainer

train_microbatches = Trainer._train_microbatches


def left_out(self, *args, **kwargs):
    loss = train_microbatches(self, *args, **kwargs)
    if int(self.state.timestamp.batch) + 1 == 6:
        self.state.optimizers[0].zero_grad(set_to_none=True)
    return loss


Trainer._train_microbatches = left_out
"""


def run(corpus: TinyCorpus, folder: Path, code: Path | str | None, **changes: Any) -> Finished:
    folder.mkdir(exist_ok=True)
    if isinstance(code, str):
        (folder / "code.py").write_text(code)
        code = folder / "code.py"
    changes = {"eval_interval": "100ba", "code_paths": [str(code)] if code else None, **changes}
    recipe = tiny_recipe(folder / "run.yaml", corpus, **changes)
    return launch(recipe, ["--trust-code"], ranks=2, cwd=folder)


def last(finished: Finished, step: int = 12) -> Path:
    return finished.folder / f"checkpoints/ep0-ba{step}"


@pytest.fixture(scope="module")
def whole(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(corpus, tmp_path_factory.mktemp("whole"), None)


def test_a_run_without_a_bad_step_is_the_same_with_and_without_the_guard(
    corpus: TinyCorpus, whole: Finished, tmp_path: Path
) -> None:
    without = run(corpus, tmp_path, WITHOUT)
    assert whole.code == without.code == 0, whole.output + without.output
    assert same_state(last(whole), last(without)) > 20
    assert whole.metrics(LOSS) == without.metrics(LOSS)
    assert not whole.metrics(SKIPPED)


def test_a_skipped_step_is_exactly_an_update_that_was_left_out(
    corpus: TinyCorpus, whole: Finished, tmp_path: Path
) -> None:
    (tmp_path / "skips").mkdir()
    code = sabotage(tmp_path / "skips/code.py", "output", 6, module=f"{BLOCK}.ffn.up_proj", rank=1, micro_batch=2)
    skips = run(corpus, tmp_path / "skips", code, bad_steps={"non_finite": {"action": "skip"}})
    reference = run(corpus, tmp_path / "reference", LEAVES_OUT)
    assert skips.code == reference.code == 0, skips.output + reference.output
    assert same_state(last(skips), last(reference)) > 20
    with pytest.raises(AssertionError, match="differs"):
        same_state(last(skips), last(whole))
    assert skips.metrics(SKIPPED) == {5: 1}  # rows of metrics.jsonl count finished steps
    losses, expected = skips.metrics(LOSS), reference.metrics(LOSS)
    assert losses.pop(5) != expected.pop(5)
    assert losses == expected
    assert "the step is skipped (1 of 10)" in skips.output
    assert skips.output.count(f"first in {BLOCK}.ffn.up_proj (forward pass, rank 1, micro-batch 2)") == 1
    draw_loss_curve(skips.folder / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def rewound(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("rewound")
    return run(corpus, folder, sabotage(folder / "code.py", "loss", 9, last_step=10, factor=4.0), **REWIND)


def test_a_spike_goes_back_leaves_the_window_out_and_recovers(rewound: Finished, whole: Finished) -> None:
    assert rewound.code == 0, rewound.output
    assert "; going back to ep0-ba6, leaving out steps 8-11" in rewound.output
    assert f"set aside in {Path('runs/run/checkpoints/.set-aside')}: ep0-ba9" in rewound.output
    assert rewound.metrics(SKIPPED) == dict.fromkeys(range(7, 11), 1)
    (record,) = json.loads((rewound.folder / "skipped_steps.json").read_text())["rewinds"]
    assert (record["first"], record["last"], record["step"], record["done"]) == (8, 11, 6, True)
    assert rewound.metrics(LOSS)[15] < whole.metrics(LOSS)[7]
    # A step without update keeps the optimizer's state, its count of steps included.
    steps = {value.item() for name, value in read_state(last(rewound, 16)).items() if name.endswith(".step")}
    assert steps == {12.0}
    # The second trainer of the process does not share the memory with the first.
    assert rewound.output.count("models in memory: 1\n") == 4
    assert "models in memory: 2" not in rewound.output


@pytest.mark.parametrize(
    "kills",
    [
        ["step-10", "set-aside"],
        pytest.param(["step-9", "decided", "step-12"], marks=pytest.mark.long),
    ],
    ids=lambda kills: "+".join(kills),
)
def test_killed_runs_that_go_back_are_the_same_bit_for_bit(
    corpus: TinyCorpus, rewound: Finished, tmp_path: Path, kills: list[str]
) -> None:
    code = sabotage(tmp_path / "code.py", "loss", 9, last_step=10, factor=4.0, kills=kills)
    for _ in kills:
        killed = run(corpus, tmp_path, code, **REWIND)
        if killed.code == 0:
            break
        assert -9 in killed.codes
    finished = killed if killed.code == 0 else run(corpus, tmp_path, code, **REWIND)
    assert finished.code == 0, finished.output
    assert same_state(last(finished, 16), last(rewound, 16)) > 20
    assert finished.metrics(LOSS) == rewound.metrics(LOSS)
    assert finished.metrics(SKIPPED) == rewound.metrics(SKIPPED)


@pytest.mark.long  # it waits
def test_a_way_back_that_takes_its_time_is_no_hang(corpus: TinyCorpus, tmp_path: Path) -> None:
    """A checkpoint of a large model is not hashed, and no save of it waited for, within the limit of a step."""
    code = sabotage(tmp_path / "code.py", "loss", 9, last_step=10, factor=4.0)
    slow = """
import time
from llmtrain.training import bad_steps
verify = bad_steps.verify_together

def slowly(checkpoint):
    time.sleep(12)
    return verify(checkpoint)

bad_steps.verify_together = slowly
"""
    code.write_text(code.read_text() + slow)
    finished = run(corpus, tmp_path, code, watchdog={"step_limit": 6}, **REWIND)
    assert finished.codes == (0, 0), finished.output
    assert "; going back to ep0-ba6, leaving out steps 8-11" in finished.output


@pytest.mark.long
def test_skips_are_counted_over_resumes_and_bounded(corpus: TinyCorpus, tmp_path: Path) -> None:
    code = sabotage(tmp_path / "code.py", "output", 4, last_step=7, module=BLOCK, kills=["step-6"])
    settings = {"save_interval": "1ba", "bad_steps": {"non_finite": {"action": "skip", "max_skipped": 3}}}
    killed = run(corpus, tmp_path, code, **settings)
    assert -9 in killed.codes
    stopped = run(corpus, tmp_path, code, **settings)
    assert stopped.codes == (3, 3), stopped.output
    assert "the step is skipped (3 of 3)" in stopped.output
    assert "step 7: the loss is not finite" in stopped.output
    assert "stopped: 3 steps of this run were skipped before (non_finite.max_skipped)" in stopped.output
    # Starting once more stops once more, at the same step.
    again = run(corpus, tmp_path, code, **settings)
    assert again.codes == (3, 3)
    assert "step 7: the loss is not finite" in again.output


@pytest.mark.long
def test_without_a_checkpoint_to_go_back_to_steps_are_skipped_and_bounded(corpus: TinyCorpus, tmp_path: Path) -> None:
    code = sabotage(tmp_path / "code.py", "loss", 6, last_step=11, factor=4.0)
    cfg = {"window": 4, "threshold": 30, "max_rewinds": 3}
    stopped = run(corpus, tmp_path, code, bad_steps={"loss_spike": cfg}, save_interval="6ba")
    assert stopped.codes == (3, 3), stopped.output
    for number in (1, 2, 3):  # one spike, of which no step was applied
        line = f"no checkpoint before step 4 to go back to: the step is skipped ({number} of 3)"
        assert stopped.output.count(line) == 1
    assert "step 9: loss 2" in stopped.output
    assert "stopped: 3 spikes of this run were left out before (loss_spike.max_rewinds)" in stopped.output


@pytest.mark.long
def test_rewinds_are_bounded(corpus: TinyCorpus, tmp_path: Path) -> None:
    code = sabotage(tmp_path / "code.py", "loss", 6, last_step=11, factor=4.0)
    cfg = {"window": 4, "threshold": 30, "max_rewinds": 2, "skip_before": 0, "skip_after": 0}
    stopped = run(corpus, tmp_path, code, bad_steps={"loss_spike": cfg}, save_interval="4ba")
    assert stopped.codes == (3, 3), stopped.output
    assert "going back to ep0-ba4, leaving out steps 6-6" in stopped.output
    assert "going back to ep0-ba4, leaving out steps 7-7" in stopped.output
    assert "step 8: loss 2" in stopped.output
    assert "stopped: 2 spikes of this run were left out before (loss_spike.max_rewinds)" in stopped.output


@pytest.mark.long
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_spike_can_be_skipped_or_stop_the_run(corpus: TinyCorpus, tmp_path: Path, action: str) -> None:
    code = sabotage(tmp_path / "code.py", "loss", 6, factor=4.0)
    cfg = {"window": 4, "threshold": 30, "action": action}
    done = run(corpus, tmp_path, code, bad_steps={"loss_spike": cfg})
    assert "step 6: loss 2" in done.output
    assert done.code == (0 if action == "skip" else 3), done.output
    if action == "skip":
        reference = run(corpus, tmp_path / "reference", LEAVES_OUT)
        assert same_state(last(done), last(reference)) > 20


@pytest.mark.long
def test_weights_that_were_not_finite_before_the_step_are_told_apart(corpus: TinyCorpus, tmp_path: Path) -> None:
    code = """
import torch
from llmtrain.model.mpt import MPT
made = MPT.__init__
def poisoned(self, *args, **kwargs):
    made(self, *args, **kwargs)
    if not self.transformer.norm_f.weight.is_meta:
        with torch.no_grad():
            self.transformer.norm_f.weight[3] = torch.nan
MPT.__init__ = poisoned
"""
    stopped = run(corpus, tmp_path, code, bad_steps={"non_finite": {"action": "skip"}})
    assert stopped.codes == (3, 3), stopped.output
    assert "step 1: 1 weights are not finite before this step" in stopped.output
    assert "model.transformer.norm_f.weight" in stopped.output
    assert "there is no checkpoint" in stopped.output


@pytest.mark.long
def test_weights_that_an_update_has_blown_up_are_not_saved(corpus: TinyCorpus, tmp_path: Path) -> None:
    code = """
import torch
from llmtrain.training.bad_steps import BadSteps
decide = BadSteps.decide
def blown_up(self, state, logger):
    decide(self, state, logger)
    if int(state.timestamp.batch) + 1 == 8:
        state.optimizers[0].param_groups[0]["lr"] = float("inf")
BadSteps.decide = blown_up
"""
    stopped = run(corpus, tmp_path, code)
    assert stopped.codes == (3, 3), stopped.output
    assert "step 8: its update has left" in stopped.output
    assert (stopped.folder / "checkpoints/latest").resolve().name == "ep0-ba4"
    assert not (stopped.folder / "checkpoints/ep0-ba8").exists()
