"""Tasks of lm-evaluation-harness: on a model of ours, and on its export with the harness's own `hf` model."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from llmtrain.errors import UserError
from llmtrain.evaluation.harness_config import HarnessConfig
from llmtrain.evaluation.ranks import Ranks
from llmtrain.generation.load import load
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.ranks import run_ranks
from tests.evaluation.harness_fixtures import LENGTH, TASKS, export, train, write_group, write_tasks

pytest.importorskip("lm_eval")

from llmtrain.evaluation.harness import run_harness


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus: TinyCorpus) -> Path:
    """`export/`, a model; `tasks/`, YAML files and data."""
    folder = tmp_path_factory.mktemp("harness")
    export(train(corpus), folder / "export", corpus.tokenizer)
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def opened(place: Path) -> tuple[Any, Any]:
    return load(place / "export", device="cpu")


@pytest.fixture(scope="module")
def measured(opened: tuple[Any, Any], place: Path) -> tuple[Any, str]:
    """All tasks, with their samples in `samples/`."""
    return run(opened, place / "samples", tasks=str(place / "tasks"), log_samples=True)


def run(opened: tuple[Any, Any], samples: Path | None = None, **settings: Any) -> tuple[Any, str]:
    console = Console(file=io.StringIO(), width=200)
    found = run_harness(*opened, HarnessConfig(**settings), console=console, samples=samples)
    return found, console.file.getvalue()


def values(found: Any) -> dict[tuple[str, str], float]:
    return {(row.task, row.metric): row.value for row in found.rows}


def test_metrics_are_those_of_the_harness_own_model_on_the_export(
    measured: tuple[Any, str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No export is needed, and none of the numbers changes; nor does any answer or likelihood behind them."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(place / "tasks")  # the harness itself looks for data below the current folder
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    hf = HFLM(pretrained=str(place / "export"), device="cpu", dtype="float32", batch_size=4, max_length=LENGTH)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=".", include_defaults=False)
    theirs = simple_evaluate(model=hf, tasks=sorted(TASKS), task_manager=manager, bootstrap_iters=1000)
    ours, _ = measured
    assert {row.task for row in ours.rows} == set(TASKS)
    for row in ours.rows:
        metrics = theirs["results"][row.task]
        key = row.metric if "," in row.metric else f"{row.metric},none"
        assert row.value == pytest.approx(metrics[key], rel=1e-5, abs=1e-7), row
        stderr = metrics[key.replace(",", "_stderr,")]
        assert (row.stderr is None) if stderr == "N/A" else row.stderr == pytest.approx(stderr, rel=1e-4, abs=1e-7)
        assert row.n == 24
        assert row.num_fewshot == theirs["n-shot"][row.task]
        if row.metric.startswith(("acc", "exact_match")):
            assert 0 < row.value < 1, row  # nothing that every model gets
    for name in TASKS:
        lines = (place / "samples" / f"samples-{name}.jsonl").read_text().splitlines()
        for line, sample in zip(map(json.loads, lines), theirs["samples"][name], strict=True):
            for mine, other in zip(line["resps"], sample["resps"], strict=True):
                if name == "tiny_answers":
                    assert mine == other
                elif name == "tiny_rolling":
                    assert mine == pytest.approx(other, abs=1e-3)
                else:
                    assert mine[0][0] == pytest.approx(other[0][0], abs=1e-3)
                    assert mine[0][1] == other[0][1]


def on_this_rank(place: Path) -> list[dict[tuple[str, str], float]]:
    """Replicated, then sharded."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, tokenizer = load(place / "export", device="cpu")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    console = Console(file=io.StringIO())
    config = HarnessConfig(tasks=str(place / "tasks"), batch_tokens=900)
    whole = run_harness(model, tokenizer, config, ranks, console=console)
    mesh = init_device_mesh("cpu", (ranks.world,))
    for block in model.transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shared = run_harness(model, tokenizer, config, ranks, sharded=True, console=console)
    return [values(whole), values(shared)]


def test_any_number_of_ranks_and_any_batch_give_the_same(measured: tuple[Any, str], place: Path) -> None:
    alone = values(measured[0])
    for rank in run_ranks(on_this_rank, 2, place):
        for found in rank:
            assert found == pytest.approx(alone, rel=1e-5)
            assert {key: found[key] for key in found if "acc" in key[1]} == {
                k: alone[k] for k in alone if "acc" in k[1]
            }


def test_groups_keep_their_average_and_say_what_was_expected(
    opened: tuple[Any, Any], measured: tuple[Any, str], place: Path, tmp_path: Path
) -> None:
    write_group(tmp_path / "group", place / "tasks")
    alone = values(measured[0])
    mean = (alone["tiny_endings", "acc"] + alone["tiny_letters", "acc"]) / 2
    wanted = {"task": "tiny_group", "expected": {"acc": round(mean, 3), "f1": 0.5}}
    found, said = run(opened, include_path=str(tmp_path / "group"), tasks=[wanted])
    (row,) = found.rows
    assert (row.task, row.metric, row.n, row.expected) == ("tiny_group", "acc", 48, round(mean, 3))
    assert row.value == pytest.approx(mean)
    assert row.stderr is not None
    assert f"tiny_group: acc {mean:.4f}, as expected ({mean:.3g} within 0.01)" in said
    assert "note: tiny_group: f1 0.5 is expected, and the task gives no such metric" in said
    (run_,) = found.about["harness"]["runs"]
    assert run_["versions"]["tiny_letters"] == 1.5
    assert run_["results"]["tiny_letters"]["acc,none"] == alone["tiny_letters", "acc"]
    json.dumps(found.as_dict())


def test_examples_limits_and_expectations_of_each_task(opened: tuple[Any, Any], place: Path) -> None:
    file = str(place / "tasks" / "tiny_endings.yaml")
    tasks = [file, {"task": file, "num_fewshot": 3, "limit": 5, "expected": {"acc": 0.9}}]
    found, said = run(opened, tasks=tasks, num_fewshot=1, limit=7)
    assert [(row.label, row.n, row.expected) for row in found.rows if row.metric == "acc"] == [
        ("tiny_endings/1-shot", 7, None),
        ("tiny_endings/3-shot", 5, 0.9),
    ]
    assert "of 5 samples; 0.9 is of all" in said
    zero = {**yaml.safe_load(Path(file).read_text()), "num_fewshot": 0}
    (place / "tasks-zero").mkdir()
    for split in ("train", "test"):
        (place / "tasks-zero" / f"{split}.jsonl").write_text((place / "tasks" / f"{split}.jsonl").read_text())
    (place / "tasks-zero" / "zero.yaml").write_text(yaml.safe_dump(zero))
    found, said = run(opened, tasks=str(place / "tasks-zero"), num_fewshot=2, limit=2)
    assert "note: tiny_endings: says num_fewshot: 0 itself and keeps it, not 2" in said
    assert found.rows[0].label == "tiny_endings/0-shot"


def test_a_chat_template_makes_turns_of_questions(
    opened: tuple[Any, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = opened[1]
    settings = {"tasks": str(place / "tasks" / "tiny_endings.yaml"), "limit": 2, "apply_chat_template": True}
    with pytest.raises(UserError, match="has no chat template"):
        run(opened, **settings)
    template = "{% for m in messages %}<{{m.role}}>{{m.content}}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    monkeypatch.setattr(tokenizer, "chat_template", template + "{% endif %}")
    for multiturn, turns in ((True, 3), (False, 1)):
        run(opened, tmp_path, **settings, system_instruction="Go on", fewshot_as_multiturn=multiturn, log_samples=True)
        line = json.loads((tmp_path / "samples-tiny_endings.jsonl").read_text().splitlines()[0])
        context, continuation = line["arguments"][0]
        assert context.startswith("<system>Go on\n<user>")
        assert (context.count("<user>"), context.count("<assistant>")) == (turns, turns)
        assert context.endswith("<assistant>")
        assert continuation == line["doc"]["choices"][0]


def test_drawn_answers_do_not_depend_on_batches(opened: tuple[Any, Any], place: Path, tmp_path: Path) -> None:
    answers = []
    for budget, temperature in ((100, 1.0), (10_000, 1.0), (10_000, 0.7)):
        gen_kwargs = {"do_sample": True, "temperature": temperature, "until": ["."], "max_gen_toks": 6}
        settings = {"tasks": str(place / "tasks" / "tiny_answers.yaml"), "gen_kwargs": gen_kwargs, "log_samples": True}
        run(opened, tmp_path, **settings, limit=8, batch_tokens=budget)
        lines = (tmp_path / "samples-tiny_answers.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["resps"][0][0] for line in lines])
    assert answers[0] == answers[1] != answers[2]
    assert not any("." in text for text in answers[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_kwargs": {"num_beams": 4}}, "num_beams: 4: not supported"),
        ({"gen_kwargs": {"max_gen_toks": LENGTH}}, "leave no room for the question"),
        ({"tasks": "no/such.yaml"}, "no such file"),
        ({"include_path": "no/such"}, "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    settings: dict[str, Any], message: str, opened: tuple[Any, Any], place: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(opened, **{"tasks": str(place / "tasks" / "tiny_answers.yaml"), "limit": 2, **settings})


def test_missing_data_is_one_message_that_names_the_task(
    opened: tuple[Any, Any], place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    block = yaml.safe_load((place / "tasks" / "tiny_letters.yaml").read_text())
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(block))
    with pytest.raises(UserError, match=r"^tiny_letters: the data of this task is not on this machine .* HF_HOME"):
        run(opened, tasks=str(tmp_path / "moved.yaml"))
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump({**block, "output_type": "poem"}))
    with pytest.raises(UserError, match=r"^tiny_letters: this task cannot be loaded"):
        run(opened, tasks=str(tmp_path / "moved.yaml"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.long
def test_the_harness_own_tasks_without_a_network(opened: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"helaswag: the harness has no such task.* Did you mean hellaswag"):
        run(opened, tasks="helaswag")
    with pytest.raises(UserError, match=r"^arc_challenge: the data of this task is not on this machine"):
        run(opened, tasks="arc_challenge")


@pytest.mark.slow
@pytest.mark.long
def test_recipes_expect_metrics_that_the_harness_tasks_have(repository: Path) -> None:
    """By the harness's own files: their data is not here."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from llmtrain.evaluation.recipe import load_eval_recipe

    index = TaskManager().task_index
    for name in ("mpt-7b", "mpt-7b-instruct", "mpt-7b-chat"):
        recipe = load_eval_recipe(repository / "yamls" / "eval" / f"{name}.yaml")
        assert len(recipe.harness.tasks) == 6
        for task in recipe.harness.tasks:
            says = load_yaml(index[task.task].yaml_path, resolve_func=False)
            metrics = {block["metric"] for block in says.get("aggregate_metric_list", says.get("metric_list"))}
            filters = {block["name"] for block in says.get("filter_list", [])} or {"none"}
            for label in task.expected:
                metric, _, chosen = label.partition(",")
                assert metric in metrics
                assert (chosen or "none") in filters


def test_the_shipped_task_runs(opened: tuple[Any, Any], repository: Path) -> None:
    found, _ = run(opened, tasks=str(repository / "yamls" / "eval" / "tasks"), num_fewshot=1)
    assert [(row.task, row.metric, row.n) for row in found.rows] == [
        ("python_endings", "acc", 50),
        ("python_endings", "acc_norm", 50),
    ]
