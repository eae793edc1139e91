"""Results as tables and files: nothing is lost on the way, and what was there before is replaced whole."""

import csv
import io
import json
from pathlib import Path

import torch
from rich.console import Console

from llmtrain.evaluation.by_position import LossByPosition
from llmtrain.evaluation.losses import Measured
from llmtrain.evaluation.report import Evaluated, print_results, write_results
from llmtrain.evaluation.results import TaskResult, TaskResults, merged


def measured(label: str | None, loss: float, n_bytes: float) -> Measured:
    losses = LossByPosition()
    losses.add(torch.full((2, 9), loss), torch.ones(2, 9, dtype=torch.int64))
    return Measured(label, "text", 9, losses, 0.5, {}, {"x": n_bytes})


def evaluated(name: str, loss: float, acc: float) -> Evaluated:
    rows = [
        TaskResult("hellaswag", 10, "acc_norm", acc, 0.004, 10_042, expected=0.7757, random_baseline=0.25),
        TaskResult("wikitext", 0, "word_perplexity", 11.5, n=62, higher_is_better=False),
    ]
    tasks = TaskResults(rows, {"commonsense": 0.5}, {"harness": {"lm_eval": "0"}})
    return Evaluated({"source": name}, [measured("val", loss, 100.0), measured("odd", loss, float("nan"))], tasks)


def shown(*found: Evaluated, **console) -> str:
    out = Console(file=io.StringIO(), **console)
    print_results(out, found)
    return out.file.getvalue()


def test_bits_per_byte() -> None:
    at = measured(None, 0.6931471805599453, 32.0)
    assert at.losses.targets == 16
    assert abs(at.bits_per_byte - 0.5) < 1e-6
    assert measured(None, 1.0, float("nan")).bits_per_byte is None


def test_models_stand_side_by_side() -> None:
    said = shown(evaluated("ours", 2.0, 0.77), evaluated("theirs", 3.0, 0.5))
    (line,) = [line.split() for line in said.splitlines() if line.startswith("hellaswag")]
    assert line == [
        *("hellaswag", "10", "acc_norm", "0.7700", "±", "0.0040", "0.7757"),
        *("0.5000", "±", "0.0040", "0.7757", "0.2500", "10,042"),
    ]
    assert [line.split()[:5] for line in said.splitlines() if line.startswith("theirs")] == [
        ["theirs", "val", "9", "3.0000", "20.09"],
        ["theirs", "odd", "9", "3.0000", "20.09"],
    ]
    (average,) = [line.split() for line in said.splitlines() if line.startswith("commonsense")]
    assert average == ["commonsense", "0.5000", "0.5000"]


def test_no_column_is_lost_on_a_narrow_terminal() -> None:
    wide = shown(evaluated("ours", 2.0, 0.77), evaluated("theirs", 3.0, 0.5))
    narrow = shown(evaluated("ours", 2.0, 0.77), evaluated("theirs", 3.0, 0.5), width=40, force_terminal=True)
    assert "word_perplexity" in narrow
    assert all(word in narrow for word in wide.split())


def test_files(tmp_path: Path) -> None:
    found = [evaluated("ours", 2.0, 0.77)]
    content = {**found[0].as_dict(), "seed": 17}
    written = write_results(tmp_path / "eval" / "a.b", content, found)
    assert [path.name for path in written] == ["a.b.json", "a.b.txt", "a.b.csv", "a.b.png"]
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {path.name for path in written}
    read = json.loads(written[0].read_text())
    assert read == content
    assert read["tasks"][0]["expected"] == 0.7757
    assert "stderr" not in read["tasks"][1]
    assert "bits_per_byte" not in read["lengths"][1]
    assert "0.7700 ± 0.0040" in written[1].read_text()
    rows = list(csv.DictReader(written[2].open()))
    assert sum(int(row["targets"]) for row in rows if row["data"] == "val" and row["model"] == "ours") == 16
    assert written[3].read_bytes().startswith(b"\x89PNG")

    only_tasks = [Evaluated({"source": "ours"}, [], found[0].tasks)]
    written = write_results(tmp_path / "eval" / "a.b", only_tasks[0].as_dict(), only_tasks)
    assert [path.suffix for path in written] == [".json", ".txt", ".png"]
    assert not (tmp_path / "eval" / "a.b.csv").exists()  # it would be of the evaluation before


def test_infinity_is_no_json(tmp_path: Path) -> None:
    found = [evaluated("ours", 2000.0, float("nan"))]
    written = write_results(tmp_path / "a", found[0].as_dict(), found)
    read = json.loads(written[0].read_text(), parse_constant=lambda name: 1 / 0)
    assert read["lengths"][0]["loss"] == 2000
    assert read["lengths"][0]["perplexity"] is None
    assert read["tasks"][0]["value"] is None


def test_results_of_several_engines() -> None:
    one, two = evaluated("a", 1.0, 0.5).tasks, TaskResults([TaskResult("b", None, "acc", 1.0)], {"x": 1.0}, {"icl": 1})
    both = merged([one, two])
    assert [row.label for row in both.rows] == ["hellaswag/10-shot", "wikitext/0-shot", "b"]
    assert both.averages == {"commonsense": 0.5, "x": 1.0}
    assert both.about.keys() == {"harness", "icl"}
