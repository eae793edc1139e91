from pathlib import Path

import pytest
import yaml

from llmtrain.config.problems import ConfigError
from llmtrain.recipe.check import check
from llmtrain.recipe.load import load_recipe


def test_what_is_printed_is_the_same_recipe(write, tmp_path: Path) -> None:
    path = write(variables={"x": 3})
    printed = check(path, ["seed=${variables.x}"])
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    assert load_recipe(again) == load_recipe(path, ["seed=3"])
    assert yaml.safe_load(printed)["seed"] == 3


def test_the_summary_counts(write) -> None:
    text = check(write(save_folder="runs/{run_name}/checkpoints"))
    assert "16 x 128 = 2,048 tokens" in text
    assert "100 steps, 204,800 tokens" in text
    assert "runs/small/checkpoints, every 1000ba; resumes" in text
    # 512 * 64 embeddings, 128 * 64 positions, 2 blocks of 12 * 64^2 weights and 13 * 64 biases and norms, a last norm
    assert f"{512 * 64 + 128 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64:,} parameters" in text


@pytest.mark.parametrize(("duration", "steps"), [("3000tok", 2), ("4097tok", 3), ("17sp", 2), ("7ba", 7)])
def test_steps_of_a_duration(write, duration: str, steps: int) -> None:
    assert f" {steps} steps," in check(write(max_duration=duration), ["scheduler.t_warmup=0.1dur"])


def test_epochs_depend_on_the_data(write) -> None:
    assert "the number of steps depends on the data" in check(write(max_duration="2ep"))


def test_notes_and_ranks(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    text = check(write(fsdp_config={"forward_prefetch": True}, save_filename="x.pt"))
    assert "# note: fsdp_config.forward_prefetch: true has no effect." in text
    assert "# note: save_filename has no effect" in text
    assert "# ranks       8: 1 x 2 samples each" in text


def test_secrets_are_masked(write) -> None:
    text = check(write(tokenizer={"name": "t", "kwargs": {"token": "planted"}},
                       loggers={"wandb": {"init_kwargs": {"api_key": "planted"}}}))  # fmt: skip
    assert "planted" not in text


def test_mistakes_are_raised(write) -> None:
    with pytest.raises(ConfigError, match="1 mistake"):
        check(write(nonsense=1))


RECIPES = sorted((Path(__file__).parents[2] / "yamls").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert ": valid." in check(path)
