import pytest
import yaml

from llmtrain.config.problems import ConfigError
from llmtrain.prep.run import load_recipe

BASE = {
    "out": "out",
    "max_seq_len": 32,
    "tokenizer": {"name": "somewhere"},
    "sources": [{"name": "docs", "files": ["*.txt"]}],
}


def load(tmp_path, *stages):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**BASE, "stages": list(stages)}, sort_keys=False))
    return load_recipe(path).stages


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"name": "exact_dedupe"}, "exact_dedup"),
        ({"name": "length"}, "give at least one bound, for example min_words"),
        ({"name": "length", "min_words": 5, "max_words": 4}, "min_words 5 is above max_words 4"),
        ({"name": "length", "min_word": 5}, "min_words"),
        ({"name": "regex", "patterns": ["("], "action": "drop"}, "is no regular expression"),
        (
            {"name": "regex", "patterns": ["x"], "action": "drop", "replacement": "y"},
            "replacement needs action: replace",
        ),
        ({"name": "regex", "patterns": ["x"], "action": "replace", "replacement": r"\1"}, "invalid group reference"),
        ({"name": "function", "function": "no_colon"}, "function"),
        ({"name": "minhash_dedup", "num_buckets": 200, "hashes_per_bucket": 60}, "above 4096 hashes"),
        ({"name": "pii", "kinds": ["address"]}, "stages[1].kinds[0]: address"),
    ],
)
def test_mistakes_name_the_key_and_the_line(tmp_path, stage, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"name": "exact_dedup"}, stage)
    text = str(caught.value)
    assert message in text
    assert "recipe.yaml:" in text


def test_stages_are_in_the_order_of_the_file(tmp_path):
    names = ["pii", "length", "exact_dedup", "pii"]
    stages = load(tmp_path, *({"name": name, **({"min_words": 1} if name == "length" else {})} for name in names))
    assert [stage.name for stage in stages] == names
