"""Every shipped recipe is valid, builds the model that it names, and says where its figures come from."""

import json
import re
from pathlib import Path

import pytest
import torch

from llmtrain.model.config import MPTConfig
from llmtrain.model.flops import n_params
from llmtrain.model.mpt import MPT
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.conversation_config import ConversationRecipe
from llmtrain.prep.run import load_recipe as load_data_recipe
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.recipe import Recipe
from llmtrain.recipe.schema import json_schema
from llmtrain.training.optimizers import DecoupledLionWConfig

YAMLS = Path(__file__).parent.parent / "yamls"
DATA_PREP = YAMLS.parent / "data_prep"

PARAMETERS = {
    "mpt-tiny": None,
    "mpt-tiny-instruct": None,
    "mpt-tiny-chat": None,
    "mpt-tiny-storywriter": None,
    "mpt-125m": 123_685_632,
    "mpt-350m": 353_682_432,
    "mpt-760m": 757_016_064,
    "mpt-1b": 1_311_344_640,
    "mpt-3b": 2_645_854_720,
    "mpt-7b": 6_649_286_656,  # published
    "mpt-7b-instruct": 6_649_286_656,
    "mpt-7b-chat": 6_649_286_656,
    "mpt-7b-storywriter": 6_649_286_656,
    "mpt-13b": 12_841_538_560,
    "mpt-30b": 29_957_200_896,  # the model card says 29.95B
}

# llm-foundry's README, scripts/train/benchmarking: learned positions, biases, vocabulary of 50,368.
LADDER = {
    "mpt-125m": 125_311_488,
    "mpt-350m": 355_985_408,
    "mpt-760m": 760_470_528,
    "mpt-1b": 1_315_950_592,
    "mpt-3b": 2_651_837_440,
    "mpt-13b": 12_853_954_560,
}
AS_LLM_FOUNDRY = [
    "model.attn_config.alibi=false",
    "model.learned_pos_emb=true",
    "model.no_bias=false",
    "model.vocab_size=50368",
]


def test_every_recipe_stands_in_the_table_of_counts() -> None:
    assert {path.stem for path in YAMLS.glob("*.yaml")} == PARAMETERS.keys() | {"finetune-hf-lora"}  # no MPT


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_is_valid_and_builds_its_model(name: str) -> None:
    recipe = load_recipe(YAMLS / f"{name}.yaml")
    assert recipe.run_name == name
    built = sum(p.numel() for p in MPT(recipe.model, device="meta").parameters())
    assert built == n_params(recipe.model)
    if PARAMETERS[name] is not None:
        assert built == PARAMETERS[name]


@pytest.mark.parametrize("name", LADDER)
def test_the_overrides_that_a_ladder_recipe_names_give_llm_foundrys_model(name: str) -> None:
    text = (YAMLS / f"{name}.yaml").read_text()
    assert all(override in text for override in AS_LLM_FOUNDRY)
    assert f"{LADDER[name]:,}" in text
    assert n_params(load_recipe(YAMLS / f"{name}.yaml", AS_LLM_FOUNDRY).model) == LADDER[name]


@pytest.mark.parametrize("name", [n for n, count in PARAMETERS.items() if count is not None])
def test_the_count_in_the_heading_is_right(name: str) -> None:
    heading = (YAMLS / f"{name}.yaml").read_text().split("run_name:")[0]
    assert f"{PARAMETERS[name]:,} parameters" in heading


def test_mpt_7b_is_the_released_model() -> None:
    recipe = load_recipe(YAMLS / "mpt-7b.yaml")
    model, attention = recipe.model, recipe.model.attn_config
    assert (model.d_model, model.n_heads, model.n_layers, model.vocab_size) == (4096, 32, 32, 50432)
    assert (attention.alibi, attention.alibi_bias_max, model.no_bias) == (True, 8, True)
    assert (recipe.max_seq_len, recipe.global_train_batch_size) == (2048, 1760)
    assert recipe.tokenizer.name == "EleutherAI/gpt-neox-20b"
    steps = int(str(recipe.max_duration).removesuffix("ba"))
    assert steps == -(-(10**12) // (1760 * 2048))
    streams = recipe.train_loader.dataset.streams
    assert streams is not None
    shares = {name: stream.proportion for name, stream in streams.items()}
    assert sum(share for share in shares.values() if share) == pytest.approx(1)
    published = {0.33: 1, 0.299: 1, 0.1: 2, 0.04: 1, 0.035: 1, 0.033: 1, 0.03: 1, 0.019: 1, 0.014: 1}
    assert {share: list(shares.values()).count(share) for share in set(shares.values())} == published
    # One stream for each source of the data recipe, where prep writes it.
    data = load_data_recipe(DATA_PREP / "mpt-7b.yaml")
    assert isinstance(data, PrepRecipe)
    assert {source.name: source.proportion for source in data.sources} == shares
    assert {stream.local for stream in streams.values()} == {f"{data.out}/{source.name}" for source in data.sources}


@pytest.mark.parametrize("name", ["mpt-7b", "mpt-30b"])
def test_the_documented_switch_to_lion_works(name: str) -> None:
    text = (YAMLS / f"{name}.yaml").read_text()
    switch = re.search(r"#   (optimizer\.name=decoupled_lionw .*)\n", text)
    assert switch is not None
    overrides = [part.strip("'") for part in switch[1].split()]
    optimizer = load_recipe(YAMLS / f"{name}.yaml", overrides).optimizer
    assert isinstance(optimizer, DecoupledLionWConfig)
    assert (optimizer.lr, tuple(optimizer.betas)) == (1e-4, (0.9, 0.99))


@pytest.mark.parametrize("name", [n for n in PARAMETERS if not n.startswith("mpt-tiny")])
def test_each_figure_has_its_source_or_says_unpublished(name: str) -> None:
    blocks = {"model", "optimizer", "scheduler", "algorithms", "fsdp_config"}
    top = {"max_seq_len", "max_duration", "global_train_batch_size", "precision", "seed"}
    block = ""
    for line in (YAMLS / f"{name}.yaml").read_text().splitlines():
        if re.match(r"\w", line):
            block = line.split(":")[0]
        value = re.match(r"\s*[\w]+: +(?!mpt_causal_lm|auto|mixed|meta|sharded|\$\{)[^#\s]", line)
        if value and (block in top or (block in blocks and line.startswith(" "))):
            assert re.search(r"# .*(\[(card|config|ladder|mpt-7b|base|sft|instruct|blog)\]|unpublished)", line), line


def test_the_committed_schema_is_the_current_one() -> None:
    """Editors complete recipes with it: `llmtrain schema > yamls/recipe.schema.json`."""
    assert json.loads((YAMLS / "recipe.schema.json").read_text()) == json_schema()
    for path in YAMLS.glob("*.yaml"):
        assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")


@pytest.mark.parametrize("path", sorted(DATA_PREP.glob("*.yaml")), ids=lambda path: path.stem)
def test_data_recipe_is_valid(path: Path) -> None:
    assert load_data_recipe(path).sources


@pytest.mark.parametrize("name", ["instruct", "chat"])
@pytest.mark.parametrize("size", ["7b", "tiny"])
def test_fine_tuning_reads_what_its_data_recipe_writes(size: str, name: str) -> None:
    recipe = load_recipe(YAMLS / f"mpt-{size}-{name}.yaml")
    data = load_data_recipe(DATA_PREP / f"{'mpt-7b' if size == '7b' else 'tiny'}-{name}.yaml")
    assert isinstance(data, ConversationRecipe)
    written = {data.out} | {f"{data.out}/{source.name}" for source in data.sources}
    for loader in recipe.finetuning_loaders().values():
        streams = loader.dataset.streams
        read = {stream.local for stream in streams.values()} if streams else {loader.dataset.local}
        assert read <= written
    trained = recipe.finetuning_loaders()["train_loader"].dataset.streams
    if data.split_by_source:
        assert trained is not None
        assert {stream.local for stream in trained.values()} == written - {data.out}


def test_the_twins_build_on_each_other() -> None:
    tiny, instruct, chat = (load_recipe(YAMLS / f"mpt-tiny{name}.yaml") for name in ("", "-instruct", "-chat"))
    assert instruct.model.pretrained == f"runs/{tiny.run_name}"
    assert chat.model.pretrained == f"runs/{instruct.run_name}"
    assert tiny.tokenizer.name == instruct.tokenizer.name == chat.tokenizer.name
    assert chat.model.vocab_size == 4224 > instruct.model.vocab_size == tiny.model.vocab_size


def test_instruct_is_the_published_run() -> None:
    """The figures of llm-foundry's mpt-7b_dolly_sft.yaml."""
    recipe = load_recipe(YAMLS / "mpt-7b-instruct.yaml")
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.betas, optimizer.weight_decay) == (
        *("decoupled_adamw", 5e-6, (0.9, 0.999)),
        0,
    )
    assert (recipe.max_duration, recipe.global_train_batch_size, recipe.max_seq_len) == ("2ep", 48, 2048)
    dataset = recipe.finetuning_loaders()["train_loader"].dataset
    assert (dataset.target_prompts, dataset.target_responses, dataset.packs) == ("none", "last", False)


def test_storywriter_is_the_published_run() -> None:
    """Its config.json, its card and the announcement; the rest of the model is the base model's."""
    recipe, base = (load_recipe(YAMLS / f"mpt-7b{name}.yaml") for name in ("-storywriter", ""))
    attention = recipe.model.attn_config
    assert (recipe.max_seq_len, recipe.max_duration, recipe.device_train_microbatch_size) == (65536, "2500ba", 1)
    assert (attention.alibi, attention.alibi_bias_max, attention.clip_qkv) == (True, 16, 6)
    assert recipe.fsdp_config is not None
    assert recipe.fsdp_config.activation_checkpointing
    assert recipe.model.pretrained == f"runs/{base.run_name}"
    assert differing(base.model, recipe.model) == {"attn_config.alibi_bias_max", "attn_config.clip_qkv"}


@pytest.mark.parametrize("size", ["7b", "tiny"])
def test_storywriter_reads_rows_of_one_long_document_each(size: str) -> None:
    recipe = load_recipe(YAMLS / f"mpt-{size}-storywriter.yaml")
    data = load_data_recipe(DATA_PREP / f"{'mpt-7b' if size == '7b' else 'tiny'}-storywriter.yaml")
    assert isinstance(data, PrepRecipe)
    assert (data.cut, data.max_seq_len, data.min_document_tokens) == ("documents", 65536, 65536)
    assert recipe.max_seq_len == data.max_seq_len
    assert data.has_validation()
    for loader in (recipe.train_loader, *recipe.eval_loader):
        assert loader.dataset.local == data.out
    assert recipe.callbacks is not None
    assert recipe.callbacks.loss_by_position is not None


def test_the_tiny_storywriter_is_of_the_tiny_base_model() -> None:
    tiny, story = (load_recipe(YAMLS / f"mpt-tiny{name}.yaml") for name in ("", "-storywriter"))
    data = load_data_recipe(DATA_PREP / "tiny-storywriter.yaml")
    assert isinstance(data, PrepRecipe)
    assert story.model.pretrained == f"runs/{tiny.run_name}"
    assert tiny.tokenizer.name == story.tokenizer.name == data.tokenizer.name
    assert differing(tiny.model, story.model) == {"attn_config.clip_qkv"}


def differing(base: MPTConfig, other: MPTConfig) -> set[str]:
    """Keys of the model itself that differ; not those of training and of its length."""
    run = {"init_device", "pretrained", "init_config", "max_seq_len"}
    ours, theirs = (config.model_dump(exclude=run) for config in (base, other))
    attention, its = ours.pop("attn_config"), theirs.pop("attn_config")
    inside = {f"attn_config.{key}" for key in attention if attention[key] != its[key]}
    return inside | {key for key in ours if ours[key] != theirs[key]}


def test_meta_models_hold_no_memory() -> None:
    model = MPT(load_recipe(YAMLS / "mpt-30b.yaml").model, device="meta")
    assert all(p.device == torch.device("meta") for p in model.parameters())


def test_recipe_is_plain_data() -> None:
    """What is written to RUN/recipe.yaml loads again as the same recipe."""
    for path in YAMLS.glob("*.yaml"):
        recipe = load_recipe(path)
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
