import pytest
from pydantic import ValidationError

from llmtrain.model.checkpointing_target import Target, parts_of
from llmtrain.model.config import MPTConfig


def parts(target: Target | None, n_layers: int = 6) -> dict[str, list[int]]:
    found = parts_of(
        target, n_layers, attn_type="multihead_attention", ffn_type="mptmlp", norm_type="low_precision_layernorm"
    )
    return {part: sorted(blocks) for part, blocks in found.items()}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, {"block": [0, 1, 2, 3, 4, 5]}),
        ("MPTBlock", {"block": [0, 1, 2, 3, 4, 5]}),
        (["grouped_query_attention", "mptmlp"], {"attn": [0, 1, 2, 3, 4, 5], "ffn": [0, 1, 2, 3, 4, 5]}),
        ({"mptblock": 3}, {"block": [0, 1, 2]}),
        ({"mptblock": 30}, {"block": [0, 1, 2, 3, 4, 5]}),
        ({"mptblock": "first-2, last-1", "layernorm": "range-2-4"}, {"block": [0, 1, 5], "norms": [2, 3]}),
        ({"mptblock": "middle-2"}, {"block": [1, 2]}),  # llm-foundry: start = max_block_idx // 2 - m // 2
        ({"multihead_attention": [0, "last-2"]}, {"attn": [0, 4, 5]}),
    ],
)
def test_meanings_are_llm_foundrys(target: Target | None, expected: dict[str, list[int]]) -> None:
    assert parts(target) == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mptglu", "no part of this model's blocks; there are: mptblock, grouped_query_attention"),
        ("norm_attn_norm", "fused"),
        ({"mptblock": "all"}, "first-n, middle-m, last-k or range-i-j"),
        ({"mptblock": [6]}, "the model has blocks 0 to 5"),
        ({"mptblock": 2, "mptmlp": "last-5"}, "block 1 is to be recomputed as a whole and in part"),
    ],
)
def test_mistakes_are_named(target: Target, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts(target)
    with pytest.raises(ValidationError, match=message):
        MPTConfig(n_layers=6, activation_checkpointing_target=target)
