"""What a user relies on: the same command again continues the run as if nothing had happened."""

import shutil
import signal
from pathlib import Path

import pytest

from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, Run, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.state import same_state

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS = "loss/train/total"


def assert_same_run(left: Finished, right: Finished, step: int = 12) -> None:
    """The same losses at every step, evaluations, weights and optimizer state, bit for bit."""
    for key in (LOSS, "metrics/eval/LanguageCrossEntropy", "lr-DecoupledAdamW/group0"):
        assert left.metrics(key) == right.metrics(key), key
    assert list(left.metrics(LOSS)) == list(range(step))
    compared = same_state(*(run.folder / f"checkpoints/ep0-ba{step}" for run in (left, right)))
    assert compared >= 14 * 4  # parameters; for each its value, two moments and a step count


@pytest.fixture(scope="module")
def recipe(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return tiny_recipe(folder / "whole.yaml", corpus, callbacks={"lr_monitor": {}})


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Finished:
    """A run of two ranks that nobody disturbed."""
    run = launch(recipe, ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    return run


def kill_at(recipe: Path, name: str, step: int, *, ranks: int = 2) -> None:
    """Starts a run and kills all ranks with SIGKILL when `step` is done."""
    run = Run(recipe, [f"run_name={name}"], ranks=ranks, cwd=recipe.parent)
    run.wait_for(f"step {step} ")
    run.send(signal.SIGKILL)
    assert run.wait().codes == (-signal.SIGKILL,) * ranks


def test_killed_and_restarted_run_is_the_same_bit_for_bit(recipe: Path, whole: Finished) -> None:
    kill_at(recipe, "killed", 7)
    again = launch(recipe, ["run_name=killed"], ranks=2, cwd=recipe.parent)
    assert again.code == 0, again.output
    assert "step 4" in again.output  # it says from where it continues
    assert_same_run(whole, again)


def test_finished_run_says_so_and_exits_with_success(recipe: Path, whole: Finished) -> None:
    before = (whole.folder / "metrics.jsonl").read_bytes()
    again = launch(recipe, ranks=2, cwd=recipe.parent)
    assert again.code == 0, again.output
    assert "complete at step 12" in again.output
    assert (whole.folder / "metrics.jsonl").read_bytes() == before


def test_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(recipe: Path, whole: Finished) -> None:
    run = whole.folder.with_name("damaged")
    shutil.copytree(whole.folder, run, symlinks=True)
    shard = run / "checkpoints/ep0-ba12/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (run / "checkpoints/latest").unlink()
    (run / "checkpoints/latest").symlink_to("ep0-ba99")  # dangling: Composer would start at step 0
    again = launch(recipe, ["run_name=damaged"], ranks=2, cwd=recipe.parent)
    assert again.code == 0, again.output
    assert "ep0-ba12" in again.output
    assert "hash differs" in again.output
    assert_same_run(whole, again)
    assert (run / "checkpoints/latest").resolve().name == "ep0-ba12"


def test_nothing_starts_over_where_all_checkpoints_are_damaged(recipe: Path, whole: Finished) -> None:
    run = whole.folder.with_name("torn")
    shutil.copytree(whole.folder, run, symlinks=True)
    for metadata in run.glob("checkpoints/*/.metadata"):
        metadata.unlink()
    again = launch(recipe, ["run_name=torn"], ranks=2, cwd=recipe.parent)
    assert again.code == 2, again.output
    assert "none is complete" in again.output
    assert "Traceback" not in again.output


def test_checkpoints_without_autoresume_are_not_overwritten(recipe: Path, whole: Finished) -> None:
    again = launch(recipe, ["autoresume=false", "max_duration=20ba"], ranks=2, cwd=recipe.parent)
    assert again.code == 2, again.output
    assert "save_overwrite=true" in again.output


def test_sigterm_finishes_the_step_saves_and_the_run_goes_on_from_there(recipe: Path, whole: Finished) -> None:
    run = Run(recipe, ["run_name=preempted"], ranks=2, cwd=recipe.parent)
    run.wait_for("step 2 ")
    run.send(signal.SIGTERM, ranks=[1])  # a node may be told before the others
    ended = run.wait()
    assert ended.codes == (143, 143), ended.output
    lines = ended.output.splitlines()
    stopped = [line for line in lines if "SIGTERM: stopped after step" in line]
    assert len(stopped) == 1, "".join(lines)
    step = int(stopped[0].split("after step ")[1].split(";")[0])
    assert step < 12
    assert (ended.folder / f"checkpoints/ep0-ba{step}/manifest.json").exists()
    again = launch(recipe, ["run_name=preempted"], ranks=2, cwd=recipe.parent)
    assert again.code == 0, again.output
    assert_same_run(whole, again)


def test_two_ranks_continue_as_one_with_the_same_global_batches(corpus: TinyCorpus, tmp_path: Path) -> None:
    model = {"d_model": 48, "n_heads": 3, "n_layers": 2, "vocab_size": corpus.vocab_size, "init_device": "mixed"}
    model |= {
        "name": "mpt_causal_lm",
        "no_bias": True,
        "attn_config": {"alibi": True},
    }  # no dropout: it differs by rank
    recipe = tiny_recipe(tmp_path / "elastic.yaml", corpus, model=model)
    two = launch(recipe, ["run_name=two"], ranks=2, cwd=tmp_path)
    assert two.code == 0, two.output
    shutil.copytree(two.folder, two.folder.with_name("one"), symlinks=True)
    for name in ("ep0-ba8", "ep0-ba12"):
        shutil.rmtree(two.folder.with_name("one") / "checkpoints" / name)
    one = launch(recipe, ["run_name=one"], ranks=1, cwd=tmp_path)
    assert one.code == 0, one.output
    losses = [one.metrics(LOSS)[step] for step in range(12)]
    assert losses == pytest.approx([two.metrics(LOSS)[step] for step in range(12)], rel=1e-5)


def test_resume_in_the_second_epoch_reads_the_second_epochs_order(corpus: TinyCorpus, tmp_path: Path) -> None:
    """At an epoch's end Streaming's state still names the epoch that is over."""
    recipe = tiny_recipe(
        tmp_path / "epochs.yaml", corpus, max_duration="3ep", train_subset_num_batches=3, save_interval="1ep"
    )
    whole = launch(recipe, ["run_name=whole-epochs"], ranks=2, cwd=tmp_path)
    assert whole.code == 0, whole.output
    shutil.copytree(whole.folder, whole.folder.with_name("again"), symlinks=True)
    for checkpoint in sorted((whole.folder.with_name("again") / "checkpoints").glob("ep*"))[1:]:
        shutil.rmtree(checkpoint)
    again = launch(recipe, ["run_name=again"], ranks=2, cwd=tmp_path)
    assert again.code == 0, again.output
    assert len(whole.metrics(LOSS)) == 9
    assert whole.metrics(LOSS) == again.metrics(LOSS)


SIGTERM_AT = """
import os, signal
from pathlib import Path
from llmtrain.training.preemption import Preemption

look = Preemption.batch_checkpoint

def asked(self, state, logger):
    if int(state.timestamp.batch) == 3 and not Path({marker!r}).exists():
        os.kill(os.getpid(), signal.SIGTERM)
    look(self, state, logger)

Preemption.batch_checkpoint = asked
"""


@pytest.mark.long
def test_sigterm_after_the_last_batch_of_an_epoch_goes_on_with_the_next_epoch(
    corpus: TinyCorpus, tmp_path: Path
) -> None:
    """What is saved there is an epoch without a batch left that has not been counted yet."""
    recipe = tiny_recipe(
        tmp_path / "ends.yaml", corpus, max_duration="3ep", train_subset_num_batches=3, save_interval="2ba"
    )
    whole = launch(recipe, ["run_name=whole-ends"], ranks=2, cwd=tmp_path)
    assert whole.code == 0, whole.output
    code, marker = tmp_path / "asked.py", tmp_path / "again"
    code.write_text(SIGTERM_AT.format(marker=str(marker)))
    options = ["--trust-code", "run_name=ends", f"code_paths=[{code}]"]
    stopped = launch(recipe, options, ranks=2, cwd=tmp_path)
    assert stopped.codes == (143, 143), stopped.output
    assert (stopped.folder / "checkpoints/ep0-ba3/manifest.json").exists()
    marker.touch()
    again = launch(recipe, options, ranks=2, cwd=tmp_path)
    assert again.code == 0, again.output
    assert len(whole.metrics(LOSS)) == 9
    assert whole.metrics(LOSS) == again.metrics(LOSS)
    assert same_state(*(run.folder / "checkpoints/ep3-ba9" for run in (whole, again))) > 0
