"""The last mile: every recipe that is shipped, and what cannot be exported."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.checkpoint.layouts import choose_layout
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.recipe.check import check
from llmtrain.recipe.load import load_recipe
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training.last_mile import exercise, small_twin

RECIPES = sorted(
    path.name for path in (Path(__file__).parents[2] / "yamls").glob("*.yaml") if "model:" in path.read_text()
)


QUICK = {"mpt-tiny.yaml", "mpt-7b-storywriter.yaml", "finetune-hf-lora.yaml"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow, pytest.mark.long)) for name in RECIPES],
)
def test_every_recipe_passes_or_names_what_it_takes(name: str, repository: Path) -> None:
    lines = exercise(load_recipe(repository / "yamls" / name))
    found = next(line for line in lines if line.startswith("last mile"))
    if "lora" in name:
        assert "transformers' own" in found
    elif name == "mpt-7b-storywriter.yaml":
        assert "exported (code, float32)" in found
        assert "alibi_bias_max: 16" in lines[-1]
        assert lines[-1].endswith("Exports need --with-code.")
    else:
        assert "exported (mpt, float32), opened by transformers, 48 greedy tokens equal" in found


def test_no_recipe_is_left_out() -> None:
    assert len(RECIPES) > 12
    assert set(RECIPES) >= QUICK


def test_the_twin_has_the_same_heads_positions_and_proportions() -> None:
    config = MPTConfig.model_validate(
        {
            "d_model": 4096,
            "n_heads": 32,
            "n_layers": 32,
            "head_dim": 96,
            "vocab_size": 50432,
            "norm_type": "rmsnorm",
            "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 11008},
            "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 8, "rope": True, "clip_qkv": 6},
            "activation_checkpointing_target": {"mptblock": "last-4"},
        }
    )
    twin = small_twin(config)
    assert (twin.n_heads, twin.kv_heads, twin.n_layers, twin.vocab_size) == (32, 8, 2, 50432)
    assert twin.n_heads * twin.d_head != twin.d_model
    assert twin.ffn_hidden_size / twin.d_model == pytest.approx(config.ffn_hidden_size / config.d_model, rel=0.01)
    assert (twin.norm_type, twin.attn_config.rope, twin.attn_config.clip_qkv) == ("rmsnorm", True, 6)
    assert small_twin(MPTConfig(n_heads=12, d_model=768)).ffn_hidden_size == 4 * 96


def test_folders_and_destinations(corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exports = {"save_folder": "runs/{run_name}", "save_interval": "4ba", "push": str(tmp_path / "there")}
    recipe = tiny_recipe(tmp_path / "x.yaml", corpus, callbacks={"hf_checkpointer": exports})
    text = check(recipe, last_mile=True)
    assert "# save_folder: can be written" in text
    assert "3 export(s)" in text
    assert f"# push        {tmp_path / 'there'}: can be written" in text
    (tmp_path / "file").write_text("x")
    for key, value in (
        ("save_folder", "file/checkpoints"),
        ("callbacks.hf_checkpointer.save_folder", "file/x"),
        ("callbacks.hf_checkpointer.push", str(tmp_path / "file" / "x")),
    ):
        with pytest.raises(UserError, match=r"cannot be (made|written)"):
            check(recipe, [f"{key}={value}"], last_mile=True)


def test_without_it_check_does_not_import_torch(repository: Path) -> None:
    code = (
        "import sys; from llmtrain.recipe.check import check; check('yamls/mpt-tiny.yaml'); "
        "assert not {'torch', 'composer', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)


ROTARY = {
    "d_model": 512,
    "n_heads": 8,
    "n_layers": 2,
    "vocab_size": 512,
    "no_bias": True,
    "norm_type": "rmsnorm",
    "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}},
}


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        ({"attn_config": {"rope": True, "softmax_scale": 64**-0.5}}, "llama"),
        ({"attn_config": {"rope": True, "softmax_scale": 8**-0.5}}, "code"),  # the usual one of the twin's heads
        ({"attn_config": {"rope": True}, "d_model": 500, "head_dim": 64}, "code"),
        ({"attn_config": {"rope": True}, "head_dim": 16}, "llama"),
    ],
)
def test_the_twin_is_written_as_the_recipe_s_model_will_be(change: dict, layout: str) -> None:
    config = MPTConfig.model_validate(ROTARY | change)
    for model in (config, small_twin(config)):
        assert choose_layout(model, with_code=True, where="x").name == layout
