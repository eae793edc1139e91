import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.comparison.command import compare_command
from llmtrain.comparison.differences import differences
from llmtrain.comparison.report import as_json, compare
from llmtrain.comparison.run import Point, read_run
from llmtrain.errors import UserError

MODEL = {"name": "mpt_causal_lm", "d_model": 48, "n_heads": 3, "n_layers": 2, "max_seq_len": 64, "vocab_size": 300}


def make(
    folder: Path, losses: list[float], *, tokens: int = 100, evals: dict[int, float] | None = None, **recipe: Any
) -> Path:
    """A run's folder: a training loss a step, with so many tokens in each, and evaluations after some steps."""
    folder.mkdir(parents=True)
    content = {"run_name": folder.name, "model": MODEL, "save_folder": f"runs/{folder.name}/checkpoints"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    rows: list[dict[str, Any]] = []
    for step, loss in enumerate(losses):
        speed = {"throughput/tokens_per_sec": 1000.0 + step, "throughput/batches_per_sec": 10.0}
        rows.append({"step": step, "time/token": step * tokens, "loss/train/total": loss, **speed})
        if evals and step in evals:
            rows.append({"step": step, "metrics/c4/LanguageCrossEntropy": evals[step], "metrics/c4/TokenAccuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_losses_at_the_end_the_best_and_as_far_as_all_have_come(tmp_path: Path) -> None:
    a = make(tmp_path / "a", [5.0] * 21, evals={0: 6.0, 10: 4.0, 20: 4.5})
    b = make(tmp_path / "b", [3.0] * 6, tokens=200, evals={5: 3.5})
    found = as_json(compare([read_run(a), read_run(b)]))
    assert found["common"] == {"tokens": 1000}
    assert found["losses"] == {
        "train, smoothed: last": {"a": pytest.approx(5.0), "b": pytest.approx(3.0)},
        "train, smoothed: best": {"a": pytest.approx(5.0), "b": pytest.approx(3.0)},
        "train, smoothed: at 1,000 tokens": {"a": pytest.approx(5.0), "b": pytest.approx(3.0)},
        "c4: last": {"a": 4.5, "b": 3.5},
        "c4: best": {"a": 4.0, "b": 3.5},
        "c4: at 1,000 tokens": {"a": 4.0, "b": 3.5},
    }
    assert found["metrics"] == {"c4/TokenAccuracy: last": {"a": 0.5, "b": 0.5}}
    first, second = found["runs"]
    assert (first["steps"], first["tokens"], second["tokens"]) == (20, 2000, 1000)
    assert first["tokens_per_second"] == 1010.0
    assert first["step_seconds"] == pytest.approx(0.1)
    assert first["parameters"] == 300 * 48 + 64 * 48 + 2 * (4 * 48 * 48 + 8 * 48 * 48) + 48 * (2 + 2 * (4 + 4 + 5))


def test_a_run_that_has_diverged_has_no_last_loss(tmp_path: Path) -> None:
    a = make(tmp_path / "a", [5.0, 1.0, float("nan"), float("inf")], evals={0: 6.0, 3: float("nan")})
    b = make(tmp_path / "b", [5.0, float("nan"), 3.0, 3.0], evals={0: 6.0, 3: 5.0})  # it came back
    runs = [read_run(a), read_run(b)]
    found = as_json(compare(runs))
    assert found["losses"]["train, smoothed: last"]["a"] is None
    assert found["losses"]["train, smoothed: at 300 tokens"]["a"] is None
    assert found["losses"]["c4: last"] == {"a": None, "b": 5.0}
    assert found["losses"]["c4: best"] == {"a": 6.0, "b": 5.0}
    assert runs[0].notes == [
        "train: the loss is no finite number from step 2 on",
        "c4: the loss is no finite number from step 3 on",
    ]
    assert not runs[1].notes
    json.dumps(found, allow_nan=False)


def test_a_repeated_step_counts_once_and_half_a_line_not_at_all(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [5.0, 4.0, 3.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss/train/total": 4.25}\n{"step": 3, "loss/train/to')
    run = read_run(folder)
    assert run.losses["train"] == [Point(0, 0, 5.0), Point(1, 100, 4.25), Point(2, 200, 3.0)]


def test_only_what_differs_of_the_recipes_and_no_secrets() -> None:
    a = {
        "run_name": "a",
        "save_folder": "runs/a/checkpoints",
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
        "eval_loader": [{"label": "c4", "limit": 1}, {"label": "code", "limit": 1}],
        "loggers": {"wandb": {"api_key": "hunter2"}},
    }
    b = {
        **a,
        "run_name": "b",
        "save_folder": "runs/b/checkpoints",
        "optimizer": {"lr": 2e-3, "betas": [0.9, 0.95]},
        "eval_loader": [{"label": "code", "limit": 2}],
        "loggers": {"wandb": {"api_key": "hunter3"}},
    }
    assert differences([a, b]) == {
        "optimizer.lr": [1e-3, 2e-3],
        "eval_loader.c4.label": ["c4", "-"],
        "eval_loader.c4.limit": [1, "-"],
        "eval_loader.code.limit": [1, 2],
        "loggers.wandb.api_key": ["***", "***"],
    }
    assert differences([a, a, a]) == {}


def test_results_of_llmtrain_eval(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", [5.0]), make(tmp_path / "b", [5.0])
    tasks = [{"task": "hellaswag", "num_fewshot": 10, "metric": "acc_norm", "value": 0.4}]
    one = {"source": "x", "lengths": [{"label": "c4", "max_seq_len": 64, "loss": 2.0}], "tasks": tasks}
    for folder in (a, b):
        (folder / "eval").mkdir()
    (a / "eval/ba5.json").write_text(json.dumps({**one, "averages": {"core": 0.3}}))
    (b / "eval/ba5.json").write_text(json.dumps({"models": [one, {**one, "source": "m/y"}]}))
    (b / "eval/broken.json").write_text("{")
    found = as_json(compare([read_run(a), read_run(b)]))
    assert found["evaluations"] == {
        "ba5: c4 at 64, loss": {"a": 2.0, "b": None},
        "ba5: hellaswag/10-shot, acc_norm": {"a": 0.4, "b": None},
        "ba5: average core": {"a": 0.3, "b": None},
        "ba5 x: c4 at 64, loss": {"a": None, "b": 2.0},
        "ba5 x: hellaswag/10-shot, acc_norm": {"a": None, "b": 0.4},
        "ba5 y: c4 at 64, loss": {"a": None, "b": 2.0},
        "ba5 y: hellaswag/10-shot, acc_norm": {"a": None, "b": 0.4},
    }
    assert found["runs"][1]["notes"] == ["eval/broken.json cannot be read"]


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = make(tmp_path / "begun", [])
    (begun / "metrics.jsonl").unlink()
    old = make(tmp_path / "old", [3.0, 2.0])
    (old / "recipe.yaml").unlink()
    compare_command([begun, old, old], output=tmp_path / "out.png")
    printed = capsys.readouterr().out
    assert "old (2)" in printed
    assert "Not every run has a recipe.yaml" in printed
    notes = {run["name"]: run["notes"] for run in json.loads((tmp_path / "out.json").read_text())["runs"]}
    assert notes == {"begun": ["no metrics.jsonl yet"], "old": ["no recipe.yaml"], "old (2)": ["no recipe.yaml"]}
    assert json.loads((tmp_path / "out.json").read_text())["losses"]["train, smoothed: last"]["begun"] is None
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no run")):
        with pytest.raises(UserError, match=message):
            compare_command([path])
    with pytest.raises(UserError, match="1 to 8 runs, not 9"):
        compare_command([old] * 9)


def test_eight_runs_and_their_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make(
            tmp_path / f"group{n}" / "same-name",
            [5.0 - n / 10 - step / 50 for step in range(40)],
            evals={0: 5.0, 30: 4.0},
        )
        for n in range(8)
    ]
    written = compare_command(runs, output=tmp_path / "eight")
    assert [path.name for path in written] == ["eight.json", "eight.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    names = [run["name"] for run in json.loads(written[0].read_text())["runs"]]
    assert names == [f"group{n}/same-name" for n in range(8)]
    assert "The recipes are the same." in capsys.readouterr().out


def test_it_is_light() -> None:
    code = "import sys, llmtrain.comparison.command; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
