"""Exact causal attention in blocks of queries, with memory of O(T): never a (queries x keys) tensor.

Each block of queries attends to its keys in a few pieces (`pieces.py`), which are merged by their log-sum-exps, as in
FlashAttention (Dao 2023, arXiv:2307.08691) and ring attention. Backward runs over the same pieces with the merged
output and log-sum-exp. ALiBi is taken relative to the middle of the block of queries, not to the end of the sequence:
its numbers are small where weights are large, so that long sequences lose no precision. Without ALiBi the gradients of
queries have 1.2 to 1.3 times the error of a softmax that keeps its weights: backward computes them again from the
log-sum-exp, as every flash attention does, and that is one more rounding of a whole row. Keys that ALiBi puts out of
reach are skipped (`alibi_window.py`).

Forward and backward are custom operators: torch.compile sees one node, and selective activation checkpointing can keep
`torch.ops.llmtrain.blockwise_attention`'s results. What varies from batch to batch arrives in tensors, so nothing is
compiled again for another packing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model.kernels import pieces
from llmtrain.model.kernels.alibi_window import KeyBalls, first_kept, key_balls, negligible
from llmtrain.model.kernels.blockwise_plan import FEW, Block, plan
from llmtrain.model.kernels.interface import Kernel, Visibility

_SCORES = 1 << 23
"""Scores (or biases) that a piece may hold at once where they are held at all, a batch row."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """What the operator needs besides q, k and v."""

    plan: Tensor
    slopes: Tensor | None
    """(heads,) float64, on the CPU."""
    labels: Tensor | None
    window: int
    """-1 is none."""
    skip: bool


def _prepare(seen: Visibility) -> Blocks:
    blocks, labels = plan(seen)
    slopes = None if seen.slopes is None else torch.tensor(seen.slopes, dtype=torch.float64)
    skip = seen.skip_far_keys and slopes is not None
    if seen.device.type == "cpu":
        pieces.flash_on_cpu()  # asked here for the first time, never inside of what is recomputed
    return Blocks(blocks, slopes, labels, -1 if seen.window is None else seen.window, skip)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softmax_scale: float, dropout_p: float, softcap: float | None
) -> Tensor:
    if dropout_p:
        raise UserError("attn_pdrop: blockwise attention has no dropout; set attn_impl to auto, sdpa or eager")
    out, _, _ = blockwise_attention(
        q, k, v, blocks.plan, blocks.slopes, blocks.labels, blocks.window, softmax_scale, softcap, blocks.skip
    )
    return out  # type: ignore[no-any-return]


BLOCKWISE = Kernel("blockwise", _prepare, _attend)


class _Piece(NamedTuple):
    """Heads heads[0]..heads[1] of a block over keys keys[0]..keys[1]."""

    heads: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False
    masked: bool = False


class _Work:
    """One call: its tensors, and how a block is cut into pieces."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        slopes: Tensor | None,
        labels: Tensor | None,
        window: int,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.heads, self.kv_heads = q.shape[1], k.shape[1]
        self.n_keys = k.shape[2]
        self.offset = self.n_keys - q.shape[2]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.slopes = None if slopes is None else slopes.to(q.device, self.dtype)
        self.labels, self.window = labels, window
        self.options: dict[str, Any] = {"scale": scale, "softcap": softcap}
        self.holds_scores = softcap is not None or q.device.type != "cpu" or not pieces.flash_on_cpu()
        self.device = q.device

    def only_piece(self, blocks: list[Block]) -> _Piece | None:
        """The piece that the whole call is, if it is one: a short sequence pays for no merging."""
        if len(blocks) > 1 or blocks[0].row >= 0 or blocks[0].visible < blocks[0].whole_to:
            return None
        piece, *others = self.near(blocks[0])
        return None if others or piece.keys != (0, self.n_keys) else piece

    def near(self, block: Block) -> Iterator[_Piece]:
        """The keys from `whole_to` on, for all heads."""
        heads = (0, self.heads)
        for keys in self._spans(block, block.whole_to, block.end_query, not block.causal):
            yield _Piece(heads, keys, causal=bool(block.causal), masked=not block.causal)

    def far(self, block: Block, first: list[int]) -> Iterator[_Piece]:
        """The keys before `whole_to`, from the one that is the first for each head."""
        for h0, h1, begin in self._groups(first):
            for keys in self._spans(block, begin, block.whole_from, True):
                yield _Piece((h0, h1), keys, masked=True)
            for keys in self._spans(block, max(begin, block.whole_from), block.whole_to, False):
                yield _Piece((h0, h1), keys)

    def _groups(self, first: list[int]) -> Iterator[tuple[int, int, int]]:
        """Neighbouring heads with the same first key; each group is part of one key head's, or whole key heads'."""
        size = self.heads // self.kv_heads
        begin = 0
        for h in range(1, self.heads + 1):
            if h == self.heads or first[h] != first[begin]:
                yield from ((a, b, first[begin]) for a, b in _aligned(begin, h, size))
                begin = h

    def _spans(self, block: Block, begin: int, end: int, masked: bool) -> Iterator[tuple[int, int]]:
        """Parts of the keys begin..end that are small enough where a score or a bias for each pair is held."""
        if begin >= end:
            return
        step = end - begin
        if (masked or self.holds_scores) and not block.causal * (end == block.end_query):
            step = max(512, _SCORES // (self.heads * (block.end_query - block.first_query)))
        for a in range(begin, end, step):
            yield a, min(a + step, end)

    def bias(self, block: Block, piece: _Piece) -> Tensor | None:
        """ALiBi relative to the middle of the block, (1, heads, 1, keys), or with a mask (1 or batch, ., n, keys)."""
        keys = torch.arange(*piece.keys, device=self.device)
        bias = None
        if self.slopes is not None:
            bias = (self.slopes[slice(*piece.heads), None] * (keys - middle(block)))[None, :, None]
        if not piece.masked:
            return bias
        queries = torch.arange(block.first_query, block.end_query, device=self.device)[:, None]
        hidden = keys > queries
        if self.window >= 0:
            hidden |= keys < queries - self.window
        hidden = hidden[None, None]
        if self.labels is not None:
            labels = self.labels[block.rows]
            of_queries = labels[:, block.first_query : block.end_query, None]
            hidden = hidden | (of_queries != labels[:, None, slice(*piece.keys)])[:, None]
        if bias is None:
            bias = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(hidden, pieces.FORBIDDEN, bias)

    def of(self, x: Tensor, block: Block, piece: _Piece) -> Tensor:
        """The piece's part of something (batch, heads, n_queries, ...)."""
        return x[block.rows, slice(*piece.heads), block.first_query - self.offset : block.end_query - self.offset]

    def of_keys(self, x: Tensor, block: Block, piece: _Piece) -> Tensor:
        """The piece's part of something (batch, kv_heads, n_keys, ...)."""
        size = self.heads // self.kv_heads
        return x[block.rows, piece.heads[0] // size : -(-piece.heads[1] // size), slice(*piece.keys)]


def middle(block: Block) -> int:
    """The position that a block's ALiBi is relative to."""
    return (block.first_query + block.end_query) // 2


def _aligned(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Heads begin..end in runs that are part of one group of `size` heads, or whole groups."""
    while begin < end:
        whole = (end - begin) // size * size if begin % size == 0 else 0
        stop = begin + whole if whole else min(end, (begin // size + 1) * size)
        yield begin, stop
        begin = stop


def _read(plan: Tensor) -> list[Block]:
    return [Block(*row) for row in plan.tolist()]


@torch.library.custom_op("llmtrain::blockwise_attention", mutates_args=())
def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    slopes: Tensor | None,
    labels: Tensor | None,
    window: int,
    scale: float,
    softcap: float | None,
    skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q (batch, heads, n_queries, head_dim) over k, v (batch, kv_heads, n_keys, head_dim).

    Returns out; the log-sum-exp (batch, heads, n_queries), in float32 at least and relative to its block's ALiBi; and
    the first key that each block and head reads (blocks, heads), int64 on the CPU.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _forward(q, k, v, plan, slopes, labels, window, scale, softcap, skip)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    slopes: Tensor | None,
    labels: Tensor | None,
    window: int,
    scale: float,
    softcap: float | None,
    skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    work = _Work(q, k, slopes, labels, window, scale, softcap)
    blocks = _read(plan)
    if (only := work.only_piece(blocks)) is not None:
        out, lse = pieces.forward(q, k, v, work.bias(blocks[0], only), causal=only.causal, **work.options)
        return _laid_out(out), _laid_out(lse), torch.zeros(1, work.heads, dtype=torch.int64)
    out, lse, first = _results(q, plan)
    balls: KeyBalls | None = None
    segment: tuple[int, int] | None = None
    for index, block in enumerate(blocks):
        everything = _Piece((0, work.heads), (0, work.n_keys))
        q_block = work.of(q, block, everything)
        o, total = None, None
        for piece in work.near(block):
            o_, total_ = pieces.forward(
                q_block,
                work.of_keys(k, block, piece),
                work.of_keys(v, block, piece),
                work.bias(block, piece),
                causal=piece.causal,
                **work.options,
            )
            o, total = (o_, total_) if o is None or total is None else pieces.merge(o, total, o_, total_)
        assert o is not None
        assert total is not None
        start = [block.visible] * work.heads
        if skip and work.slopes is not None and block.visible < block.whole_to and len(q_block[0, 0]) > FEW:
            if segment != (block.row, block.segment) or balls is None:
                segment = (block.row, block.segment)
                balls = key_balls(k[block.rows], block.segment, block.segment_end)
            kept = first_kept(
                q_block,
                total,
                balls,
                low=block.visible,
                high=block.whole_to,
                middle=middle(block),
                slopes=work.slopes,
                margin=negligible(q.dtype, work.n_keys),
                **work.options,
            )
            start = kept.tolist()
        first[index] = torch.tensor(start)
        if block.visible < block.whole_to:
            wide, total = o.to(total.dtype), total.clone()
            for piece in work.far(block, start):
                heads = slice(*piece.heads)
                o_, total_ = pieces.forward(
                    work.of(q, block, piece),
                    work.of_keys(k, block, piece),
                    work.of_keys(v, block, piece),
                    work.bias(block, piece),
                    causal=False,
                    **work.options,
                )
                wide[:, heads], total[:, heads] = pieces.merge(wide[:, heads], total[:, heads], o_, total_)
            o = wide
        work.of(out, block, everything).copy_(o)
        work.of(lse, block, everything).copy_(total)
    return out, lse, first


def _laid_out(x: Tensor) -> Tensor:
    """(batch, heads, n, ...) with the strides of a transposed (batch, n, heads, ...), as the fake operators say."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _results(q: Tensor, plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, n, head_dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(batch, n, heads, head_dim).transpose(1, 2)
    lse = torch.empty(batch, n, heads, dtype=wide, device=q.device).transpose(1, 2)
    return out, lse, torch.empty(plan.shape[0], heads, dtype=torch.int64, device="cpu")


@blockwise_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    slopes: Tensor | None,
    labels: Tensor | None,
    window: int,
    scale: float,
    softcap: float | None,
    skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, plan)


@torch.library.custom_op("llmtrain::blockwise_attention_backward", mutates_args=())
def blockwise_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor,
    plan: Tensor,
    slopes: Tensor | None,
    labels: Tensor | None,
    window: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, over the same pieces."""
    work = _Work(q, k, slopes, labels, window, scale, softcap)
    blocks = _read(plan)
    with torch.autocast(q.device.type, enabled=False):
        if (only := work.only_piece(blocks)) is not None:
            bias = work.bias(blocks[0], only)
            grads = pieces.backward(grad, q, k, v, out, lse, bias, causal=only.causal, **work.options)
            dq, dk, dv = (_laid_out(x.to(q.dtype)) for x in grads)
            return dq, dk, dv
        dq, dk, dv = _gradients(q, k, work.dtype)
        starts = first.tolist()
        for index, block in enumerate(blocks):
            for piece in (*work.near(block), *work.far(block, starts[index])):
                of_query = (work.of(x, block, piece) for x in (q, out, lse))
                q_, out_, lse_ = of_query
                dq_, dk_, dv_ = pieces.backward(
                    work.of(grad, block, piece),
                    q_,
                    work.of_keys(k, block, piece),
                    work.of_keys(v, block, piece),
                    out_,
                    lse_,
                    work.bias(block, piece),
                    causal=piece.causal,
                    **work.options,
                )
                work.of(dq, block, piece).add_(dq_)
                work.of_keys(dk, block, piece).add_(dk_)
                work.of_keys(dv, block, piece).add_(dv_)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _gradients(q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        torch.zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=dtype, device=x.device) for x in (q, k, k)
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@blockwise_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor,
    plan: Tensor,
    slopes: Tensor | None,
    labels: Tensor | None,
    window: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, k, q.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, plan, slopes, labels, ctx.window, ctx.scale, ctx.softcap, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *output, plan, slopes, labels)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, first, plan, slopes, labels = ctx.saved_tensors
    grads = blockwise_attention_backward(
        grad, q, k, v, out, lse, first, plan, slopes, labels, ctx.window, ctx.scale, ctx.softcap
    )
    return (*grads, None, None, None, None, None, None, None)


blockwise_attention.register_autograd(_backward, setup_context=_keep)
