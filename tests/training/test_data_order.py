"""Which rows a run trains on and evaluates, with real ranks: subsets of an epoch, workers, temporary files."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Run, launch, read_metric
from llmtrain.testing.recipe import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS = "loss/train/total"

WITNESS = """
import multiprocessing, os, pathlib, tempfile
name = "seen-by-" + os.environ["RANK"]
pathlib.Path(name).write_text(tempfile.gettempdir() + " " + multiprocessing.get_start_method())
"""
"""For `code_paths`: where the run's temporary files go, and how its ranks start processes."""


@pytest.mark.long
def test_subset_of_an_epoch_is_not_longer_after_a_resume(corpus: TinyCorpus, tmp_path: Path) -> None:
    loader: dict[str, Any] = {
        "name": "text",
        "dataset": {"local": str(corpus.train), "shuffle": True, "num_canonical_nodes": 4},
        "num_workers": 1,
    }
    recipe = tiny_recipe(
        tmp_path / "subset.yaml",
        corpus,
        train_loader=loader,
        eval_loader=None,
        max_duration="2ep",
        train_subset_num_batches=3,
        save_interval="1ba",
    )
    whole = launch(recipe, ["run_name=whole"], ranks=2, cwd=tmp_path)
    assert whole.code == 0, whole.output
    assert len(whole.metrics(LOSS)) == 6
    assert len(set(whole.metrics(LOSS).values())) == 6
    steps = {int(path.name.partition("-ba")[2]): path.name for path in (whole.folder / "checkpoints").glob("ep*")}
    for step in (2, 3, 4):  # in the first epoch, between the two, in the second one
        name = f"from{step}"
        run = shutil.copytree(whole.folder, tmp_path / "runs" / name, symlinks=True)
        for later, folder in steps.items():
            if later > step:
                shutil.rmtree(run / "checkpoints" / folder)
        again = launch(recipe, [f"run_name={name}"], ranks=2, cwd=tmp_path)
        assert again.code == 0, again.output
        assert f"continues after step {step}" in again.output
        assert read_metric(run, LOSS) == whole.metrics(LOSS), step
    again = launch(recipe, [f"run_name={name}"], ranks=2, cwd=tmp_path)
    assert again.code == 0, again.output
    assert "complete at step 6" in again.output


@pytest.fixture
def witness(tmp_path: Path) -> list[str]:
    code = tmp_path / "witness.py"
    code.write_text(WITNESS)
    return [str(code)]


def left_behind(folder: Path, ranks: int = 2) -> list[Path]:
    """What is left of the run's temporary folder; asserts that it had one, and that its ranks fork."""
    found = []
    for rank in range(ranks):
        temporary, method = (folder / f"seen-by-{rank}").read_text().split()
        assert method == "fork"
        assert Path(temporary).name.startswith("llmtrain-")
        found += [path for path in [Path(temporary)] if path.exists()]
    return found


def test_temporary_folder_is_removed_at_the_end(corpus: TinyCorpus, witness: list[str], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run.yaml", corpus, code_paths=witness, max_duration="2ba", save_folder=None)
    run = launch(recipe, ranks=2, cwd=tmp_path)
    assert run.code == 0, run.output
    assert not left_behind(tmp_path)
    wrong = launch(recipe, ["train_loader.dataset.local=nowhere"], ranks=2, cwd=tmp_path)
    assert wrong.codes == (2, 2), wrong.output
    assert not left_behind(tmp_path)


def test_temporary_folder_is_removed_after_sigterm(corpus: TinyCorpus, witness: list[str], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run.yaml", corpus, code_paths=witness, max_duration="500ba", eval_loader=None)
    run = Run(recipe, ranks=2, cwd=tmp_path)
    run.wait_for("step 1 ")
    run.send(signal.SIGTERM)
    ended = run.wait()
    assert ended.code == 143, ended.output
    assert not left_behind(tmp_path)


def test_temporary_folder_is_removed_when_stopped_before_training(corpus: TinyCorpus, tmp_path: Path) -> None:
    code = tmp_path / "stop.py"
    code.write_text(WITNESS + "import signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    recipe = tiny_recipe(tmp_path / "run.yaml", corpus, code_paths=[str(code)])
    run = launch(recipe, ranks=2, cwd=tmp_path)
    assert run.codes == (143, 143), run.output
    assert not left_behind(tmp_path)


def test_subset_of_an_evaluation_is_the_same_rows_on_any_number_of_ranks(corpus: TinyCorpus, tmp_path: Path) -> None:
    values = []
    for ranks, size in ((1, 12), (2, 6), (3, 4)):
        recipe = tiny_recipe(
            tmp_path / f"r{ranks}.yaml",
            corpus,
            global_train_batch_size=6,
            max_duration="1ba",
            device_eval_batch_size=size,
            eval_subset_num_batches=2,
            eval_first=True,
            save_folder=None,
        )
        run = launch(recipe, ranks=ranks, cwd=tmp_path)
        assert run.code == 0, run.output
        values.append(run.metrics("metrics/eval/LanguageCrossEntropy")[0])
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)
