"""What a recipe may say about a Hugging Face model, and what is refused with advice."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.hf_model.config import HFConfig


def config(**keys: Any) -> HFConfig:
    return HFConfig(name="hf_causal_lm", pretrained_model_name_or_path="org/model", **keys)


def test_llm_foundry_block_is_understood() -> None:
    found = config(
        pretrained=True,
        init_device="mixed",
        use_auth_token=False,
        use_flash_attention_2=True,
        load_in_8bit=False,
        config_overrides={"max_position_embeddings": 4096},
        peft_config={"peft_type": "lora", "task_type": "causal_lm", "r": 16, "target_modules": ["q_proj", "v_proj"]},
    )
    assert found.attention == "flash_attention_2"
    assert found.peft_config is not None
    assert (found.peft_config.peft_type, found.peft_config.target_modules) == ("LORA", ("q_proj", "v_proj"))
    assert found.saves_adapters_only
    assert not found.trust_remote_code


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"use_auth_token": "hf_x"}, "hf auth login"),
        ({"use_auth_token": True}, "hf auth login"),
        ({"load_in_8bit": True}, "frozen_dtype"),
        ({"init_device": "meta"}, "`mixed`"),
        ({"use_flash_attention_2": True, "attn_implementation": "sdpa"}, "contradict"),
        ({"pretrained_lora_id_or_path": "org/adapter"}, "peft_config"),
        ({"pretrained": False, "peft_config": {}}, "should_save_peft_only: false"),
        ({"config_overrides": {"vocab_size": 7}}, "belongs to the weights"),
        ({"peft_config": {"peft_type": "PREFIX_TUNING"}}, "LORA"),
        ({"peft_config": {"r": 0}}, "greater than 0"),
        ({"additional_eval_metrics": ["x"]}, "Remove the key"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(keys: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValidationError, match=advice):
        config(**keys)


def test_a_token_does_not_get_into_the_message() -> None:
    with pytest.raises(ValidationError) as refused:
        config(use_auth_token="hf_secret")
    assert "hf_secret" not in str(refused.value.errors()[0]["msg"])


def test_a_recipe_with_such_a_model_is_read_without_torch() -> None:
    code = "import sys, llmtrain.hf_model.config, llmtrain.recipe.load; print({'torch', 'peft', 'transformers'} & set(sys.modules))"  # fmt: skip  # noqa: E501
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
