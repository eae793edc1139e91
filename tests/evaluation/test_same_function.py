"""What an evaluation recipe says of a model is compared with what lies beside its weights."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llmtrain.errors import UserError
from llmtrain.evaluation.same_function import as_recipe_says, check_same_tokens
from llmtrain.model.config import MPTConfig

SHAPE = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512}
STORED = MPTConfig.model_validate({**SHAPE, "attn_config": {"alibi": True, "alibi_bias_max": 16}})


def said(**keys) -> MPTConfig:
    return as_recipe_says(STORED, MPTConfig.model_validate({"name": "mpt_causal_lm", **SHAPE, **keys}), "x")


def test_the_weights_decide_and_the_kernel_is_the_recipes() -> None:
    found = said(init_device="meta", max_seq_len=17, attn_config={"attn_impl": "eager", "alibi": True})
    assert found.attn_config.attn_impl == "eager"
    assert found.attn_config.alibi_bias_max == 16
    assert found.max_seq_len == STORED.max_seq_len


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attn_config": {"alibi": False}}, r"model\.attn_config\.alibi: False, .* trained with True"),
        ({"attn_config": {"alibi_bias_max": 8}}, r"model\.attn_config\.alibi_bias_max: 8\.0, .* with 16\.0"),
        ({"no_bias": True}, r"model\.no_bias: True"),
        ({"ffn_config": {"ffn_type": "mptglu"}}, r"model\.ffn_config\.ffn_type"),
    ],
)
def test_another_function_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        said(**keys)


def tokenizer(vocab: dict[str, int]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")))


def test_a_tokenizer_with_other_ids_is_refused() -> None:
    stored = tokenizer({"a": 0, "b": 1})
    check_same_tokens(tokenizer({"a": 0, "b": 1, "c": 2}), stored, "x")  # a template's tokens were added
    with pytest.raises(UserError, match=r"'b' is 0 in it and 1 beside the weights"):
        check_same_tokens(tokenizer({"b": 0, "a": 1}), stored, "x")
    with pytest.raises(UserError, match="no token in common"):
        check_same_tokens(tokenizer({"c": 0}), tokenizer({"d": 1}), "x")
