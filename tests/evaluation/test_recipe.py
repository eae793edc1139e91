"""Evaluation recipes: llm-foundry's run, mistakes are named, and they are told from training recipes."""

from pathlib import Path

import pytest
import yaml

from llmtrain.config.problems import ConfigError
from llmtrain.evaluation.plan import Arguments, make_plan
from llmtrain.evaluation.recipe import check, is_eval_recipe, load_eval_recipe

FOUNDRY = """
variables:
  data: /nowhere
max_seq_len: 1024
seed: 1
precision: amp_bf16
dist_timeout: 6000
models:
-
  model_name: mosaicml/mpt-7b
  model:
    name: hf_causal_lm
    pretrained_model_name_or_path: mosaicml/mpt-7b
    init_device: mixed
    pretrained: true
    config_overrides:
      max_seq_len: ${max_seq_len}
  tokenizer:
    name: mosaicml/mpt-7b
    kwargs:
      model_max_length: ${max_seq_len}
-
  model_name: ours
  model:
    name: mpt_causal_lm
    d_model: 128
    n_heads: 2
    n_layers: 2
    attn_config:
      alibi: true
  load_path: runs/x/checkpoints/ep0-ba5.pt
  tokenizer:
    name: EleutherAI/gpt-neox-20b
device_eval_batch_size: 8
fsdp_config:
  sharding_strategy: FULL_SHARD
  mixed_precision: FULL
  forward_prefetch: true
  limit_all_gathers: true
eval_loader:
- name: text
  label: c4
  dataset:
    local: ${variables.data}/c4
    split: val
    shuffle: false
    max_seq_len: ${max_seq_len}
    eos_token_id: 0
  drop_last: false
  num_workers: 8
- name: text_files
  label: notes
  files: ${variables.data}/notes.jsonl
eval_subset_num_batches: 20
icl_tasks:
- label: lambada
  dataset_uri: lambada.jsonl
  num_fewshot: [0, 5]
  icl_task_type: language_modeling
icl_subset_num_batches: 4
loggers:
  wandb: {}
"""
"""The shape of llm-foundry's scripts/eval/yamls/hf_eval.yaml and mpt_eval.yaml, and a file of text."""


@pytest.fixture
def foundry(tmp_path: Path) -> Path:
    path = tmp_path / "foundry.yaml"
    path.write_text(FOUNDRY)
    return path


def test_llm_foundrys_keys(foundry: Path) -> None:
    recipe = load_eval_recipe(foundry)
    assert [model.model_name for model in recipe.models] == ["mosaicml/mpt-7b", "ours"]
    assert recipe.run_name == "foundry"
    assert recipe.models[1].tokenizer.kwargs == {"model_max_length": 1024}
    assert [loader.label for loader in recipe.eval_loader] == ["c4", "notes"]
    assert recipe.eval_loader[0].dataset.local == "/nowhere/c4"
    assert recipe.eval_loader[1].files == ("/nowhere/notes.jsonl",)
    assert recipe.icl.icl_seq_len == 1024
    assert recipe.icl.device_eval_batch_size == 8
    assert [note.split(":")[0] for note in recipe.notes()] == ["fsdp_config.forward_prefetch", "loggers"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modls=[]", "Did you mean `models`"),
        ("models.1.model.attn_config.alibii=true", "has no key `alibii`"),
        ("eval_loader.0.dataset.lcal=x", "Did you mean `local`"),
        ("eval_loader.1.label=c4", "Two loaders have this label"),
        ("eval_loader.1.label=null", "each needs a `label`"),
        ("models.1.model_name=mosaicml/mpt-7b", "Two models have this name"),
        ("models.1.load_path=null", "Nothing says where the weights are"),
        ("models=[]", "It is empty"),
        ("max_seq_len=0", "(?i)greater than 0|at least 1|above 0"),
        ("precision=amp_fp8", "amp_bf16"),
        ("max_duration=1ep", "an evaluation has none"),
        ("icl_tasks.0.num_beams=2", "no beam search"),
        ("icl_tasks=null", None),
        ("harness.tasks=[]", "."),
        ("run_name=a/b", "It names files"),
    ],
)
def test_mistakes_are_named(foundry: Path, override: str, message: str | None) -> None:
    if message is None:
        assert load_eval_recipe(foundry, [override]).icl is None
        return
    with pytest.raises(ConfigError, match=message):
        load_eval_recipe(foundry, [override])


def test_nothing_to_do_is_a_mistake(foundry: Path) -> None:
    with pytest.raises(ConfigError, match="Nothing to evaluate"):
        load_eval_recipe(foundry, ["icl_tasks=null", "eval_loader=null"])
    with pytest.raises(ConfigError, match="there are none: give `icl_tasks`"):
        load_eval_recipe(
            foundry,
            ["icl_tasks=null", "eval_gauntlet={categories: [{name: a, benchmarks: [{name: x, num_fewshot: 0}]}]}"],
        )


def test_one_model_may_stand_at_the_top(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    content = {"load_path": "runs/x", "max_seq_len": [64, 128], "eval_loader": {"dataset": {"local": "data"}}}
    path.write_text(yaml.safe_dump(content))
    assert is_eval_recipe(path)
    recipe = load_eval_recipe(path)
    assert [model.load_path for model in recipe.models] == ["runs/x"]
    assert recipe.max_seq_len == (64, 128)
    assert recipe.eval_loader[0].name == "text"


def test_recipes_are_told_apart(repository: Path, foundry: Path, tmp_path: Path) -> None:
    assert is_eval_recipe(foundry)
    training = sorted((repository / "yamls").glob("*.yaml"))
    assert len(training) > 10
    assert not any(is_eval_recipe(path) for path in training)
    (tmp_path / "broken.yaml").write_text("a: [")
    assert not is_eval_recipe(tmp_path / "broken.yaml")
    assert not is_eval_recipe(tmp_path / "nowhere.yaml")


def test_llmtrain_check_knows_them(foundry: Path) -> None:
    """What it prints is itself a recipe, and holds no secret."""
    said = check(foundry, ["metadata={api_key: s3cret}"])
    assert "2 models, 2 of data, 1 of tasks" in said
    assert "# fsdp_config.forward_prefetch: true has no effect" in said
    assert "s3cret" not in said
    again = foundry.with_name("again.yaml")
    again.write_text(said)
    assert load_eval_recipe(again).models == load_eval_recipe(foundry).models


def test_options_that_a_recipe_says_itself_are_refused(foundry: Path) -> None:
    with pytest.raises(Exception, match="--data, --num-fewshot: the evaluation recipe says what is evaluated"):
        make_plan(foundry, [], Arguments(data=[Path("x")], num_fewshot=3), "cpu")


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("yamls/eval/*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    """Recipes, and the files with tasks and averages that they name."""
    if "models" in path.read_text() or is_eval_recipe(path):
        assert load_eval_recipe(path).models
