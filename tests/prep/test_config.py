import pytest
from pydantic import ValidationError

from llmtrain.prep.config import PrepRecipe, PrepTokenizer, SourceConfig


def recipe(**changes):
    base = {
        "out": "x",
        "max_seq_len": 8,
        "tokenizer": {"name": "t"},
        "sources": [{"name": "a", "files": ["a"]}, {"name": "b", "files": ["b"]}],
    }
    return PrepRecipe.model_validate({**base, **changes})


def test_defaults():
    made = recipe()
    assert (made.compression, made.hashes, made.eos, made.bos, made.overwrite) == (
        "zstd:1",
        ["xxh64"],
        True,
        False,
        False,
    )


def test_hashes_are_sorted_for_streaming():
    assert recipe(hashes=["xxh64", "sha256", "xxh64"]).hashes == ["sha256", "xxh64"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {}}, "either name"),
        ({"tokenizer": {"name": "t", "train": {"vocab_size": 300}}}, "either name"),
        ({"tokenizer": {"train": {"vocab_size": 256}}}, "greater than or equal to 257"),
        ({"sources": []}, "at least 1"),
        ({"sources": [{"name": "a"}]}, "either files or hf_name"),
        ({"sources": [{"name": "a", "files": ["f"], "hf_name": "h"}]}, "either files or hf_name"),
        ({"sources": [{"name": "a", "files": []}]}, "files is empty"),
        ({"sources": [{"name": "../a", "files": ["f"]}]}, "pattern"),
        ({"sources": [{"name": "a", "files": ["f"]}] * 2}, "share a name: a"),
        ({"sources": [{"name": "a", "files": ["f"], "proportion": 0.5}]}, "split_by_source"),
        (
            {
                "split_by_source": True,
                "sources": [{"name": "a", "files": ["f"], "proportion": 0.5}, {"name": "b", "files": ["f"]}],
            },
            "these have none: b",
        ),
        ({"sources": [{"name": "a", "hf_name": "h", "hf_kwargs": {"trust_remote_code": True}}]}, "may not set"),
        ({"tail": "drop"}, "needs cut: documents"),
        ({"sources": [{"name": "a", "hf_name": "h", "join": "file"}]}, "give files"),
        ({"sources": [{"name": "a", "files": ["f"], "header": "# {path}"}]}, "give join"),
        ({"compression": "zstd:23"}, "pattern"),
        ({"compression": "lz4"}, "pattern"),
        ({"hashes": ["crc"]}, "hashes"),
        ({"size_limit": 2**32}, "less than"),
        ({"val_fraction": 1.0}, "less than 1"),
        ({"max_seqlen": 3}, "Extra inputs"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValidationError, match=message):
        recipe(**changes)


def test_parts_alone():
    assert PrepTokenizer(name="a").train is None
    assert SourceConfig(name="a", hf_name="b").split == "train"
