"""llm-foundry's `activation_checkpointing_target`: which parts of which blocks are recomputed. Light: no torch.

A name (`mptblock`), a list of names, or names with blocks each: a number n (the first n), numbers of blocks, or
`first-n`, `middle-m`, `last-k`, `range-i-j` ([i, j)), several with commas or as a list.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

Part = Literal["block", "attn", "ffn", "norms"]
Blocks = int | str | list[int | str]
Target = str | list[str] | dict[str, Blocks]

_SPAN = re.compile(r"(first|middle|last)-(\d+)|range-(\d+)-(\d+)")


def parts_of(
    target: Target | None, n_layers: int, *, attn_type: str, ffn_type: str, norm_type: str
) -> dict[Part, frozenset[int]]:
    """Part of a block -> the numbers of the blocks in which it is recomputed as a unit.

    llm-foundry's names are of classes; a model has one class of each part, and a name of another one is an error.

    Args:
        target: the key's value; None is whole blocks, all of them.
        n_layers: number of blocks.
        attn_type: the model's attention.
        ffn_type: the model's feed-forward network.
        norm_type: the model's norm.

    Raises:
        ValueError: an unknown name, one that this model has not, blocks that do not exist or are written wrongly, or a
            block that is to be recomputed whole and in part.
    """
    everywhere = frozenset(range(n_layers))
    if target is None or target == []:
        return {"block": everywhere}
    names = {"mptblock": "block", "grouped_query_attention": "attn", attn_type: "attn", ffn_type: "ffn"}
    names |= {norm_type: "norms", norm_type.removeprefix("low_precision_"): "norms"}
    blocks: Mapping[str, Blocks | None]
    if isinstance(target, Mapping):
        blocks = target
    else:
        blocks = dict.fromkeys([target] if isinstance(target, str) else target)
    found: dict[Part, frozenset[int]] = {}
    for name, which in blocks.items():
        part: Part | None = names.get(name.lower())  # type: ignore[assignment]
        if part is None:
            fused = " (llm-foundry's fused norms and attention are not built here)" * (name == "norm_attn_norm")
            raise ValueError(f"{name!r} is no part of this model's blocks{fused}; there are: {', '.join(names)}")
        found[part] = found.get(part, frozenset()) | (everywhere if which is None else _numbers(which, n_layers))
    whole = found.get("block", frozenset())
    for part, some in found.items():
        if part != "block" and (both := whole & some):
            raise ValueError(f"block {min(both)} is to be recomputed as a whole and in part ({part}); choose one")
    return found


def _numbers(which: Blocks, n_layers: int) -> frozenset[int]:
    if isinstance(which, int):
        return _span(f"first-{which}", n_layers)
    pieces: Sequence[int | str] = which.replace(" ", "").split(",") if isinstance(which, str) else which
    numbers: set[int] = set()
    for piece in pieces:
        if isinstance(piece, str):
            numbers |= _span(piece.replace(" ", ""), n_layers)
        elif 0 <= piece < n_layers:
            numbers.add(piece)
        else:
            raise ValueError(f"there is no block {piece}: the model has blocks 0 to {n_layers - 1}")
    return frozenset(numbers)


def _span(text: str, n_layers: int) -> frozenset[int]:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} names no blocks; write first-n, middle-m, last-k or range-i-j")
    kind, count, begin, end = match[1], int(match[2] or 0), int(match[3] or 0), int(match[4] or 0)
    if kind == "first":
        begin, end = 0, count
    elif kind == "last":
        begin, end = n_layers - count, n_layers
    elif kind == "middle":  # llm-foundry's middle
        begin = max((n_layers - 1) // 2 - count // 2, 0)
        end = begin + count
    return frozenset(range(max(begin, 0), min(end, n_layers)))
