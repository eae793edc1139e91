import sys
from pydoc_data.topics import topics

import pytest

from llmtrain.errors import UserError
from llmtrain.prep.stages import steps
from llmtrain.prep.stages.config import DatatroveFilter
from tests.prep.stages.passing import judged

pytest.importorskip("datatrove")


def stage(name, **kwargs):
    return DatatroveFilter(name="datatrove", filter=name, kwargs=kwargs)


def test_gopher_quality_with_and_without_arguments():
    prose, short = topics["exceptions"], "Too short a text for Gopher."
    left, report = judged(stage("GopherQualityFilter"), prose, short)
    assert left == [prose, None]
    assert report["counts"] == {"gopher_short_doc": 1}
    assert judged(stage("GopherQualityFilter", min_doc_words=3, min_stop_words=0), short)[0] == [short]


def test_a_filter_that_changes_the_text():
    text = "This line is fine and it ends well.\nthis one does not end\n" + "Another good line ends here too.\n" * 5
    left, report = judged(stage("C4QualityFilter", min_num_sentences=1), text)
    assert report["changed"] == 1
    assert "does not end" not in left[0]
    assert left[0].startswith("This line is fine")


def test_repetition_filter_says_the_reason():
    left, report = judged(stage("GopherRepetitionFilter"), "Buy now, or never!\n\n" * 20)
    assert left == [None]
    assert [reason.split("_")[0] for reason in report["counts"]] == ["dup"]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("GopherFilter", {}, r"there is no such filter; there are .*FineWebQualityFilter, .*GopherQualityFilter"),
        ("BaseFilter", {}, "there is no such filter"),
        ("GopherQualityFilter", {"min_words": 3}, r"kwargs \{'min_words': 3\}: TypeError: .*min_words"),
        ("SamplerFilter", {"rate": 0.5}, "its choice depends on what came before"),
        ("LambdaFilter", {}, ".*name one with the stage `function`"),
    ],
)
def test_mistakes(name, kwargs, message):
    with pytest.raises(UserError, match=f"stage datatrove: {name}: {message}"):
        judged(stage(name, **kwargs), "text")


def test_what_a_filter_needs_besides_is_named():
    with pytest.raises(UserError, match=r"stage datatrove: URLFilter: Please install .*tldextract"):
        judged(stage("URLFilter"), "text")


def test_without_datatrove_the_message_says_what_to_install(monkeypatch):
    steps._open.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "datatrove"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(UserError, match=r"GopherQualityFilter needs datatrove: pip install 'llmtrain\[quality\]'"):
        judged(stage("GopherQualityFilter"), "text")
