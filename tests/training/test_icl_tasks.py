"""Tasks and the best checkpoint while a model is trained: the numbers, and that training does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import read_best
from llmtrain.checkpoint.read import read_weights
from llmtrain.checkpoint.resolve import locate
from llmtrain.errors import UserError
from llmtrain.evaluation.icl.config import ICLConfig
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, launch, read_metric
from llmtrain.testing.recipe import tiny_recipe

LOSS, EVAL = "loss/train/total", "metrics/eval/whole/LanguageCrossEntropy"
PRONOUNS = "metrics/pronouns/0-shot/InContextLearningMultipleChoiceAccuracy"
GAUNTLET = "icl/metrics/eval_gauntlet/common_sense"
SHAPE = {"max_duration": "6ba", "eval_interval": "3ba", "save_interval": "6ba", "fsdp_config": None}


def tasks(repository: Path, *labels: str) -> list[dict[str, Any]]:
    file = repository / "yamls/eval/icl/tasks.yaml"
    found = ICLConfig(icl_tasks=str(file)).icl_tasks
    return [task.model_dump(mode="json") for task in found if not labels or task.label in labels]


def gauntlet(repository: Path) -> dict[str, Any]:
    benchmarks = [{"name": "pronouns", "num_fewshot": 0, "random_baseline": 0.5}]
    return {"categories": [{"name": "common_sense", "benchmarks": benchmarks}]}


def rows(run: Finished, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def best_of(run: Finished) -> tuple[int, float]:
    """Step and loss of the largest loss behind step 0."""
    losses = {step: value for step, value in run.metrics(EVAL).items() if step}
    step = max(losses, key=losses.__getitem__)
    return step, losses[step]


@pytest.fixture(scope="module")
def plain(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run without any evaluation."""
    folder = tmp_path_factory.mktemp("plain")
    run = launch(tiny_recipe(folder / "plain.yaml", corpus, **SHAPE | {"eval_loader": None}), cwd=folder)
    assert run.code == 0, run.output
    return run


@pytest.fixture(scope="module")
def evaluated(corpus: TinyCorpus, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same with evaluations, all that an evaluation can have, and the best checkpoint."""
    folder = tmp_path_factory.mktemp("evaluated")
    loader = {"name": "text", "dataset": {"local": str(corpus.val), "num_canonical_nodes": 2}, "num_workers": 0}
    recipe = tiny_recipe(
        folder / "x.yaml",
        corpus,
        **SHAPE,
        eval_loader=[{**loader, "label": "whole"}, {**loader, "label": "part", "subset_num_batches": 1}],
        icl_tasks=tasks(repository),
        icl_seq_len=96,
        eval_gauntlet=gauntlet(repository),
        eval_first=True,
        best_checkpoint={
            "dataloader_label": "eval/whole",
            "comp": "greater",
        },  # the first evaluation: not what retention keeps anyway
        save_num_checkpoints_to_keep=1,
        callbacks={
            "eval_output_logging": {"n_rows": 2},
            "loss_by_position": {},
            "early_stopper": {
                "monitor": "InContextLearningMultipleChoiceAccuracy",
                "dataloader_label": "pronouns/0-shot",
                "patience": "100ba",
            },
        },
    )
    run = launch(recipe, cwd=folder)
    assert run.code == 0, run.output
    return run


def test_training_does_not_notice(plain: Finished, evaluated: Finished) -> None:
    assert list(plain.metrics(LOSS)) == list(range(6))
    assert evaluated.metrics(LOSS) == plain.metrics(LOSS)  # dropout included: no random state was touched
    (_, one), (_, other) = (read_weights(run.folder / "checkpoints/ep0-ba6") for run in (plain, evaluated))
    assert all(one[name].equal(other[name]) for name in one)


def test_every_evaluation_has_all_tasks(evaluated: Finished) -> None:
    accuracies, averages = evaluated.metrics(PRONOUNS), evaluated.metrics(GAUNTLET)
    assert list(accuracies) == list(averages) == [0, 3, 6]
    for step, value in accuracies.items():
        assert averages[step] == pytest.approx((value - 0.5) / 0.5)
    assert evaluated.metrics("icl/metrics/eval_gauntlet/default_average") == averages
    categories = "metrics/general_knowledge/2-shot/{}/InContextLearningMultipleChoiceAccuracy"
    assert all(list(evaluated.metrics(categories.format(name))) == [0, 3, 6] for name in ("nature", "places"))
    exact = "metrics/python_answers/2-shot/InContextLearningGenerationExactMatchAccuracy"
    assert list(evaluated.metrics(exact)) == [0, 3, 6]
    assert f"pronouns/0-shot  step 3  accuracy {accuracies[3]:.4g}" in evaluated.output
    assert "6 of llm-foundry's kind, 46 questions at each evaluation" in evaluated.output
    positions = json.loads((evaluated.folder / "loss_by_position.json").read_text())
    # 64 tokens a row, 4 rows a batch: two batches of one (eval_subset_num_batches), one of the other
    assert {row["evaluator"]: row["targets"] for row in positions} == {"eval/whole": 8 * 63, "eval/part": 4 * 63}


def test_outputs_are_shown(evaluated: Finished) -> None:
    shown = rows(evaluated, "eval_outputs.jsonl")
    assert [row["step"] for row in shown] == sorted([0, 3, 6] * 12)
    pronouns = [row for row in shown if row["task"] == "pronouns/0-shot"][:2]
    assert pronouns[0]["scored"][1] == "The list could not hold the dictionary because the dictionary was already full."
    assert isinstance(pronouns[0]["answer"], int)
    answers = [row for row in shown if row["task"].startswith("python_answers")]
    assert "Answer:" in answers[0]["context"]
    assert isinstance(answers[0]["answer"], str)


def test_the_numbers_are_those_of_the_checkpoint(evaluated: Finished, repository: Path) -> None:
    import io

    from rich.console import Console

    from llmtrain.evaluation.icl.run import run_icl
    from llmtrain.evaluation.ranks import Ranks
    from llmtrain.generation.load import load

    model, words = load(evaluated.folder / "checkpoints/ep0-ba6", recipe=None, device="cpu", dtype=None)
    cfg = ICLConfig(icl_tasks=str(repository / "yamls/eval/icl/tasks.yaml"), icl_seq_len=96)
    found = run_icl(model, words, cfg, Ranks(), sharded=False, console=Console(file=io.StringIO()))
    values = {f"metrics/{row.task}/{row.num_fewshot}-shot/{row.metric}": row.value for row in found.rows}
    assert values[PRONOUNS] == evaluated.metrics(PRONOUNS)[6]
    lm = "metrics/python_completions/3-shot/InContextLearningLMAccuracy"
    assert values[lm] == evaluated.metrics(lm)[6]


def test_the_best_checkpoint_is_kept(evaluated: Finished) -> None:
    step, value = best_of(evaluated)
    assert step == 3
    folder = evaluated.folder / "checkpoints"
    best = read_best(folder)
    assert best is not None
    assert (best.step, best.value, best.monitor) == (step, value, "LanguageCrossEntropy")
    assert locate(folder / "best").name == best.checkpoint == f"ep0-ba{step}"
    assert manifest.verify(folder / "best") == []
    assert {path.name for path in folder.iterdir()} == {"latest", "best", "best.json", "ep0-ba6", best.checkpoint}


def test_damage_in_the_best_checkpoint_is_named(evaluated: Finished) -> None:
    best = locate(evaluated.folder / "checkpoints" / "best")
    file = best / "full.pt"
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes(9))
    with pytest.raises(UserError, match=r"full\.pt: hash differs"):
        read_weights(locate(evaluated.folder / "checkpoints" / "best"))
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
def test_two_sharded_ranks_without_a_loader(corpus: TinyCorpus, repository: Path, tmp_path: Path) -> None:
    """The best is of a task; a resumed run knows it, and retention leaves it alone."""
    changes = {
        "eval_loader": None,
        "eval_interval": "2ba",
        "icl_tasks": tasks(repository, "pronouns", "python_answers"),
        "icl_seq_len": 96,
        "fsdp_config": {"sharding_strategy": "FULL_SHARD"},
        "best_checkpoint": {
            "monitor": "InContextLearningMultipleChoiceAccuracy",
            "dataloader_label": "pronouns/0-shot",
        },
        "save_num_checkpoints_to_keep": 1,
        "save_interval": "1ba",
    }
    recipe = tiny_recipe(tmp_path / "x.yaml", corpus, **SHAPE | changes)
    whole = launch(recipe, ranks=2, cwd=tmp_path)
    assert whole.codes == (0, 0), whole.output
    accuracies = whole.metrics(PRONOUNS)
    assert list(accuracies) == [2, 4, 6]
    step = max(accuracies, key=accuracies.__getitem__)  # the first of several
    best = read_best(whole.folder / "checkpoints")
    assert best is not None
    assert (best.step, best.value) == (step, accuracies[step])
    cut = launch(recipe, ["run_name=cut", "max_duration=4ba"], ranks=2, cwd=tmp_path)
    assert cut.codes == (0, 0), cut.output
    again = launch(recipe, ["run_name=cut"], ranks=1, cwd=tmp_path)
    assert again.code == 0, again.output
    assert read_metric(again.folder, PRONOUNS) == accuracies
    assert read_best(again.folder / "checkpoints") == best
    assert {path.name for path in (again.folder / "checkpoints").glob("ep*")} == {"ep0-ba6", f"ep0-ba{step}"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
@pytest.mark.parametrize("ranks", ["replicated", "sharing sequences"])
def test_other_ways_to_use_two_ranks(ranks: str, corpus: TinyCorpus, repository: Path, tmp_path: Path) -> None:
    model = {"name": "mpt_causal_lm", "d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": corpus.vocab_size}
    changes = {
        "model": {**model, "init_device": "mixed", "attn_config": {"alibi": True}},
        "icl_tasks": tasks(repository),
        "icl_seq_len": 96,
        "eval_loader": None,
        "max_duration": "2ba",
        "eval_interval": "2ba",
        "save_folder": None,
    }
    how = {"fsdp_config": None} if ranks == "replicated" else {"sequence_parallel_degree": 2, "fsdp_config": {}}
    runs = [
        launch(tiny_recipe(tmp_path / f"{n}.yaml", corpus, **SHAPE | changes | extra), ranks=n, cwd=tmp_path)
        for n, extra in ((1, {}), (2, how))
    ]
    assert [run.code for run in runs] == [0, 0], runs[1].output
    found = [[row for row in rows(run, "metrics.jsonl") if any("InContext" in key for key in row)] for run in runs]
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_what_best_points_to_may_be_gone(tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to("ep0-ba5")
    with pytest.raises(UserError, match="best: points to ep0-ba5, which is not there any more"):
        locate(tmp_path / "best")


def test_a_missing_file_is_said_before_the_first_step(corpus: TinyCorpus, repository: Path, tmp_path: Path) -> None:
    missing = [{**task, "dataset_uri": "nowhere.jsonl"} for task in tasks(repository, "pronouns")]
    run = launch(tiny_recipe(tmp_path / "x.yaml", corpus, **SHAPE, icl_tasks=missing), cwd=tmp_path)
    assert run.code == 2
    assert "icl_tasks pronouns: dataset_uri: there is no file nowhere.jsonl" in run.output
    assert "Traceback" not in run.output
