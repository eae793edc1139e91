import io
import json

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llmtrain.prep.stages import merge_reports, print_stage_report
from llmtrain.prep.stages.config import ExactDedup, Length, Pii
from tests.prep.stages.passing import carry_out, numbered

STAGES = [
    Length(name="length", min_chars=3, max_chars=30, samples=2),
    Pii(name="pii"),
    ExactDedup(name="exact_dedup", samples=0),
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a@b.org", "x", "same text", "c@d.org", "t" * 40, "é"]), max_size=30), st.data())
def test_the_report_does_not_depend_on_partitions(texts, data):
    documents = numbered(texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(texts)), max_size=4)))
    partitions = [documents[a:b] for a, b in zip([0, *cuts], [*cuts, len(texts)], strict=True)]
    _, report = carry_out(STAGES, partitions)
    assert json.dumps(report) == json.dumps(carry_out(STAGES, [documents])[1])
    for before, after in zip(report["stages"], report["stages"][1:], strict=False):
        assert after["seen"] == before["seen"] - before["dropped"]
    assert [len(stage["samples"]) for stage in report["stages"]] == [
        min(2, report["stages"][0]["dropped"]),
        min(5, report["stages"][1]["changed"]),
        0,
    ]


def test_no_reports_are_no_stages():
    assert merge_reports([]) == {"stages": []}


def test_the_table_names_stages_counts_and_reasons():
    _, report = carry_out(STAGES, [numbered(["a", "b@c.de", "d@e.fg", "text", "[bold]"])])
    console = Console(file=io.StringIO(), width=120)
    print_stage_report(console, report)
    lines = console.file.getvalue().splitlines()
    assert lines[1].split() == ["length", "5", "1", "20.0%", "0", "0.00", "1", "below", "min_chars"]
    assert lines[2].split() == ["pii", "4", "0", "0.0%", "2", "0.00", "2", "email"]
    assert lines[3].split() == [
        "exact_dedup",
        "4",
        "1",
        "25.0%",
        "0",
        "0.00",
        "1",
        "a",
        "copy",
        "of",
        "an",
        "earlier",
        "document",
    ]
