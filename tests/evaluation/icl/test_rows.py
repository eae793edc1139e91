"""What is wrong with a file is said with its line and key."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.config.problems import ConfigError
from llmtrain.errors import UserError
from llmtrain.evaluation.icl.config import GauntletConfig, ICLConfig, ICLTaskConfig
from llmtrain.evaluation.icl.rows import by_category, read_rows

KINDS = {
    "language_modeling": {"context": "a ", "continuation": "b"},
    "multiple_choice": {"query": "q", "choices": ["a", "b"], "gold": 1},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "generation_task_with_answers": {"context": "q", "answer": "a", "aliases": ["b"]},
}


def task(file: Path | str, kind: str = "language_modeling", **more: Any) -> ICLTaskConfig:
    return ICLTaskConfig(label="t", dataset_uri=str(file), num_fewshot=[0], icl_task_type=kind, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_each_type(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f"{json.dumps(KINDS[kind])}\n\n{json.dumps(KINDS[kind])}\n")
    rows = read_rows(task(file, kind))
    assert len(rows) == 2
    assert rows[1].place == f"{file}, line 3"
    for key in KINDS[kind]:
        row = {k: v for k, v in KINDS[kind].items() if k != key}
        file.write_text(json.dumps(KINDS[kind]) + "\n" + json.dumps(row))
        if key != "aliases":
            with pytest.raises(UserError, match=rf"line 2: `{key}` is missing. A row of type {kind} has"):
                read_rows(task(file, kind))
    assert rows[0].text("context") == rows[0].text("context").strip()


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("multiple_choice", {"gold": 2}, "`gold` is 2, and there are 2 choices"),
        ("multiple_choice", {"gold": "a"}, "`gold` is 'a'; expected a number"),
        ("multiple_choice", {"choices": ["a"], "gold": 0}, "1 choice; at least two"),
        ("multiple_choice", {"choices": ["a", 1]}, r"`choices` is \['a', 1\]; expected a list of texts"),
        ("schema", {"continuation": 5}, "`continuation` is 5; expected a text"),
        ("generation_task_with_answers", {"aliases": "b"}, "`aliases` is 'b'; expected a list of texts"),
    ],
)
def test_wrong_values_are_named(kind: str, change: dict[str, Any], text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({**KINDS[kind], **change}))
    with pytest.raises(UserError, match=f"x.jsonl, line 1: {text}"):
        read_rows(task(file, kind))


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    with pytest.raises(UserError, match=r"icl_tasks t: dataset_uri: there is no file .*give the path of your copy"):
        read_rows(task(file))
    with pytest.raises(UserError, match="is a folder"):
        read_rows(task(tmp_path))
    file.write_text("")
    with pytest.raises(UserError, match="has no questions"):
        read_rows(task(file))
    file.write_text('{"context": "a", "continuation": "b"}\n{"context": ')
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_rows(task(file))
    file.write_text("[1]")
    with pytest.raises(UserError, match="line 1: expected an object, found list"):
        read_rows(task(file))


def test_categories(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    rows = [{**KINDS["language_modeling"], "category": name} for name in ("b", "a", "b")]
    file.write_text("\n".join(map(json.dumps, rows)))
    parts = by_category(task(file, has_categories=True), read_rows(task(file)))
    assert {name: len(part) for name, part in parts.items()} == {"a": 1, "b": 2}
    assert list(parts) == ["a", "b"]
    file.write_text("\n".join(map(json.dumps, [*rows, KINDS["language_modeling"]])))
    with pytest.raises(UserError, match="line 4: no `category`"):
        by_category(task(file, has_categories=True), read_rows(task(file)))


def test_a_data_set_as_the_hub_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"a": "x", "b": "y", "c": "z"}\n')
    cfg = task(
        f"hf://{folder}",
        hf_loading_vars={"split": "test"},
        hf_parsing_map={"context": ["a", "b"], "continuation": ["c"]},
    )
    (row,) = read_rows(cfg)
    assert row.values == {"context": "x y", "continuation": "z"}
    with pytest.raises(UserError, match=r"has splits test\. Choose: hf_loading_vars"):
        read_rows(cfg.model_copy(update={"hf_loading_vars": {}}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"icl_task_type": "code_evaluation"}, "is not run"),
        ({"metric_names": ["InContextLearningMultipleChoiceAccuracy"]}, "has InContextLearningLMAccuracy and"),
        ({"metric_names": ["InContextLearningLMAcuracy"]}, "has InContextLearningLMAccuracy and"),
        ({"num_fewshot": []}, "at least 1"),
        ({"num_fewshot": [1, 1]}, "twice"),
        ({"dataset_uri": "s3://bucket/x.jsonl"}, "Download it first"),
        ({"label": "a/b"}, "has no slash"),
        ({"prelimiter": "Q", "question_prelimiter": "R"}, "Keep one of the two"),
        ({"early_stopping_criteria": [""]}, "would end every answer"),
        ({"generation_kwargs": {"num_beams": 4}}, "Input should be 1"),
        ({"num_beams": 2}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], text: str) -> None:
    given = {"label": "t", "dataset_uri": "x", "num_fewshot": [0], "icl_task_type": "language_modeling", **change}
    with pytest.raises(ValidationError, match=text):
        ICLTaskConfig.model_validate(given)


def test_old_names_and_files_of_tasks(tmp_path: Path) -> None:
    old = task("x", "question_answering", metric_names=["InContextLearningQAAccuracy"])
    assert old.icl_task_type == "generation_task_with_answers"
    assert old.metrics == ("InContextLearningGenerationExactMatchAccuracy",)
    ece = task("x", metric_names=["InContextLearningExpectedCalibrationError"])
    assert ece.metrics == ("InContextLearningLMExpectedCalibrationError",)
    file = tmp_path / "tasks.yaml"
    file.write_text("icl_tasks:\n- label: t\n  dataset_uri: x\n  num_fewshots: [0]\n  icl_task_type: schema\n")
    with pytest.raises(
        ConfigError, match=r"2 mistakes[\s\S]*tasks.yaml:4: icl_tasks\[0\].num_fewshots: [\s\S]*mean `num_fewshot`"
    ):
        ICLConfig(icl_tasks=str(file))
    with pytest.raises(ValidationError, match="t/0-shot stands there twice"):
        ICLConfig(icl_tasks=[task("x").model_dump(), task("y").model_dump()])


def test_the_gauntlet_of_llm_foundry(repository: Path) -> None:
    folder = repository / "yamls/eval/icl"
    cfg = ICLConfig(icl_tasks=f"{folder}/foundry-tasks.yaml", eval_gauntlet=f"{folder}/foundry-gauntlet.yaml")
    assert cfg.eval_gauntlet is not None
    benchmarks = {(b.name, b.num_fewshot) for category in cfg.eval_gauntlet.categories for b in category.benchmarks}
    assert benchmarks == {(task.label, shots) for task in cfg.icl_tasks for shots in task.num_fewshot}
    assert len(benchmarks) == 33


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"averages": {"all": ["b"]}}, "No category 'b'. Known: a"),
        ({"averages": {"a": ["a"]}}, "A category has this name"),
        ({"subtract_random_baseline": False}, "needs `subtract_random_baseline: true`"),
        ({"weighting": "SIZE"}, "EQUAL"),
        ({"categories": []}, "at least one"),
    ],
)
def test_gauntlets_that_cannot_be(change: dict[str, Any], text: str) -> None:
    category = {"name": "a", "benchmarks": [{"name": "t", "num_fewshot": 0, "random_baseline": 0.5}]}
    with pytest.raises(ValidationError, match=text):
        GauntletConfig.model_validate({"categories": [category], **change})
