"""Hugging Face models trained for real: on two ranks as on one, and resumed bit for bit."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from llmtrain.hf_model.checkpoint import read_tensors
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, Run, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.state import same_state
from tests.hf_model.conftest import save_model

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS = "loss/train/total"
LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}


def recipe_of(path: Path, corpus: TinyCorpus, architecture: str, model: dict[str, Any], **changes: Any) -> Path:
    folder = path.parent / architecture
    if not folder.exists():
        save_model(folder, architecture, vocab_size=500, **({"n_positions": 64} if architecture == "gpt2" else {}))
    block = {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(folder), **model}
    settings: dict[str, Any] = {
        "model": block,
        "max_duration": "6ba",
        "save_interval": "3ba",
        "eval_interval": "6ba",
        "eval_subset_num_batches": -1,
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
    }
    return tiny_recipe(path, corpus, **{**settings, **changes})


def run(recipe: Path, *overrides: str, ranks: int) -> Finished:
    finished = launch(recipe, overrides, ranks=ranks, cwd=recipe.parent)
    assert finished.code == 0, finished.output
    return finished


@pytest.mark.parametrize(
    ("architecture", "model", "changes"),
    [
        # tied; rank 1 starts on meta, without the frequencies of its rotary embedding
        pytest.param("qwen3", {}, {}, marks=pytest.mark.long),
        ("gpt_neox", {}, {"fsdp_config": {"sharding_strategy": "SHARD_GRAD_OP", "activation_checkpointing": True}}),
        pytest.param("gemma2", {"init_device": "cpu"}, {}, marks=pytest.mark.long),  # capped logits, tied
        pytest.param(
            "llama",
            {"peft_config": LORA},
            {"fsdp_config": {"activation_checkpointing": True}},
            marks=pytest.mark.long,
        ),
        pytest.param("llama", {"peft_config": LORA, "frozen_dtype": "bfloat16"}, {}, marks=pytest.mark.long),
        pytest.param(
            "llama",
            {"peft_config": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}},
            {},
            marks=pytest.mark.long,
        ),
    ],
    ids=["qwen3", "gpt_neox", "gemma2", "lora", "lora-bf16", "lora-whole-layers"],
)
def test_two_ranks_train_as_one_process(
    architecture: str, model: dict[str, Any], changes: dict[str, Any], corpus: TinyCorpus, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path / "run.yaml", corpus, architecture, model, **changes)
    alone = run(recipe, "run_name=alone", "fsdp_config=null", "save_folder=null", ranks=1)
    together = run(recipe, "run_name=together", ranks=2)
    losses, expected = together.metrics(LOSS), alone.metrics(LOSS)
    assert list(losses) == list(expected) == list(range(6))
    near = 5e-3 if "frozen_dtype" in model else 1e-5  # bfloat16 rounds to three digits, and threads round differently
    assert list(losses.values()) == pytest.approx(list(expected.values()), abs=near)
    assert losses[5] < losses[0] - 0.05
    evaluated = [one.metrics("metrics/eval/LanguageCrossEntropy") for one in (together, alone)]
    assert list(evaluated[0].values()) == pytest.approx(list(evaluated[1].values()), abs=near)


@pytest.mark.parametrize(
    ("adapters", "state_dict_type"),
    [
        pytest.param(False, "sharded", marks=pytest.mark.long),
        (True, "sharded"),
        pytest.param(True, "full", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_continues_bit_for_bit(
    adapters: bool, state_dict_type: str, corpus: TinyCorpus, tmp_path: Path
) -> None:
    model = {"peft_config": {**LORA, "lora_dropout": 0.1}} if adapters else {"config_overrides": {"attention_dropout": 0.1}}  # fmt: skip  # noqa: E501
    fsdp = {"state_dict_type": state_dict_type, "load_monolith_rank0_only": state_dict_type == "full"}
    recipe = recipe_of(tmp_path / "whole.yaml", corpus, "llama", model, fsdp_config=fsdp)
    whole = run(recipe, ranks=2)
    killed = Run(recipe, ["run_name=killed"], ranks=2, cwd=tmp_path)
    killed.wait_for("checkpoints/ep0-ba3 ")  # written beside the steps that follow
    killed.send(signal.SIGKILL)
    killed.wait()
    again = run(recipe, "run_name=killed", ranks=2)
    assert "continues after step 3" in again.output
    assert again.metrics(LOSS) == whole.metrics(LOSS)
    pair = [finished.folder / "checkpoints/ep0-ba6" for finished in (whole, again)]
    if state_dict_type == "sharded":
        assert same_state(*pair) > 20
    names = set(read_tensors(pair[0]))
    assert (names == {n for n in names if ".lora_" in n} | {"frozen_weights_hash"}) is adapters


@pytest.mark.long
def test_adapters_refuse_another_base_and_go_on_on_any_number_of_ranks(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "run.yaml", corpus, "llama", {"peft_config": LORA})
    whole = run(recipe, "run_name=whole", ranks=1)
    run(recipe, "max_duration=3ba", ranks=2)
    elastic = run(recipe, ranks=1)
    assert list(elastic.metrics(LOSS).values()) == pytest.approx(list(whole.metrics(LOSS).values()), abs=1e-5)
    shutil.rmtree(elastic.folder / "checkpoints/ep0-ba6")
    base = json.loads((tmp_path / "llama/config.json").read_text())
    shutil.rmtree(tmp_path / "llama")
    save_model(tmp_path / "llama", "llama", **{"vocab_size": 500, "initializer_range": base["initializer_range"] * 2})
    refused = launch(recipe, [], ranks=2, cwd=tmp_path)
    assert refused.code != 0
    assert "not those that they were trained on" in refused.output
    assert "Traceback" not in refused.output


def test_what_only_rank_zero_finds_out_is_one_message(corpus: TinyCorpus, tmp_path: Path) -> None:
    model = {"peft_config": LORA, "pretrained_lora_id_or_path": str(tmp_path / "nowhere")}
    refused = launch(recipe_of(tmp_path / "run.yaml", corpus, "llama", model), ranks=2, cwd=tmp_path)
    assert refused.codes == (2, 2)
    assert refused.output.count("pretrained_lora_id_or_path: there is no folder") == 1
    assert "Traceback" not in refused.output

    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    loader = {"name": "finetuning", "dataset": {"files": str(data), "packing": True, "cache_dir": "cache"}}
    recipe = recipe_of(tmp_path / "packed.yaml", corpus, "bloom", {}, train_loader={**loader, "num_workers": 0})
    refused = launch(recipe, ranks=2, cwd=tmp_path)
    assert refused.codes == (2, 2)
    assert refused.output.count("train_loader.dataset.packing: bloom") == 1
