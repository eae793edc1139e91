import subprocess
import sys

import pytest

from llmtrain.config.problems import ConfigError
from llmtrain.recipe.load import load_recipe, spread_length

LOADER = {"name": "text", "dataset": {"local": "data"}}


def test_one_length_knob(write) -> None:
    recipe = load_recipe(write(eval_loader=[{**LOADER, "label": "a"}, {**LOADER, "label": "b"}]), ["max_seq_len=256"])
    lengths = [recipe.model.max_seq_len, recipe.tokenizer.kwargs["model_max_length"]]
    lengths += [loader.dataset.max_seq_len for loader in (recipe.train_loader, *recipe.eval_loader)]
    assert lengths == [256] * 5


def test_what_is_said_lower_down_stays(write) -> None:
    recipe = load_recipe(
        write(
            eval_loader={**LOADER, "dataset": {"local": "data", "max_seq_len": 64}},
            tokenizer={"name": "t", "kwargs": {"model_max_length": 100}},
        ),
        ["model.max_seq_len=512"],
    )
    assert recipe.model.max_seq_len == 512
    assert recipe.tokenizer.kwargs == {"model_max_length": 100}
    assert recipe.train_loader.dataset.max_seq_len == 128
    assert recipe.eval_loader[0].dataset.max_seq_len == 64


def test_rows_longer_than_the_model_are_refused(write) -> None:
    with pytest.raises(ConfigError, match="Sequences of 128 tokens do not fit the model's max_seq_len of 64"):
        load_recipe(write(), ["model.max_seq_len=64"])


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"max_seq_len": 3},
        {"max_seq_len": 3, "model": 3, "tokenizer": [], "eval_loader": "x", "train_loader": {"dataset": None}},
        {"max_seq_len": [1], "model": {}, "tokenizer": {"kwargs": 3}, "eval_loader": [3, {}]},
    ],
)
def test_spreading_bears_anything_and_changes_nothing_in_place(data: dict) -> None:
    before = repr(data)
    spread_length(data)
    assert repr(data) == before


def test_the_run_has_a_name(write, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe(write()).run_name == "small"
    monkeypatch.setenv("RUN_NAME", "from-env")
    assert load_recipe(write()).run_name == "from-env"
    assert load_recipe(write(run_name="mine")).run_name == "mine"
    assert load_recipe(write(run_name="mine"), ["run_name=yours"]).run_name == "yours"


def test_mistakes_in_spread_values_point_at_the_knob(write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(), ["max_seq_len=long"])
    assert [".".join(problem.path) for problem in caught.value.problems] == ["max_seq_len"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(max_seq_len=None))
    assert [".".join(problem.path) for problem in caught.value.problems] == ["max_seq_len"]


def test_loading_is_light(write) -> None:
    """No torch, no composer, no transformers; few times the CPU of importing what each recipe needs."""
    program = (
        "import sys, time\n"
        "import omegaconf, pydantic, yaml\n"
        "needed = time.process_time()\n"  # the interpreter's own start included
        "from llmtrain.recipe.check import check\n"
        "from llmtrain.recipe.schema import json_schema\n"
        "check(sys.argv[1]); json_schema(); seconds = time.process_time()\n"
        "heavy = {'torch', 'composer', 'streaming', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(seconds / needed)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(write())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 6.0  # about 3.2


def test_packed_examples_are_kept_apart_without_being_asked(write) -> None:
    loader = {"name": "finetuning", "dataset": {"files": "x.jsonl", "packing": True}}
    assert load_recipe(write(train_loader=loader)).model.attn_config.attn_uses_sequence_id
    ratio = {"name": "finetuning", "dataset": {"files": "x.jsonl", "packing_ratio": "auto"}}
    assert load_recipe(write(train_loader=ratio)).model.attn_config.attn_uses_sequence_id
    plain = {"name": "finetuning", "dataset": {"files": "x.jsonl"}}
    assert not load_recipe(write(train_loader=plain)).model.attn_config.attn_uses_sequence_id


def test_packed_examples_may_not_see_each_other(write) -> None:
    loader = {"name": "finetuning", "dataset": {"files": "x.jsonl", "packing": True}}
    model = {"d_model": 32, "n_heads": 2, "n_layers": 1, "attn_config": {"attn_uses_sequence_id": False}}
    with pytest.raises(
        ConfigError, match=r"model\.attn_config\.attn_uses_sequence_id: false\n.*they would see each other"
    ):
        load_recipe(write(train_loader=loader, model=model))
