"""torch's fused scaled_dot_product_attention, with the bias in the cheapest form that it takes.

On a CPU ALiBi alone is one row for all queries (`AlibiRow`): the public function takes either a bias or causality, and
computes a whole (heads, T, T) bias; the private kernel behind it takes both.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.errors import UserError
from llmtrain.model.kernels.dense import dense_bias
from llmtrain.model.kernels.interface import Kernel, Visibility, repeat_kv
from llmtrain.model.kernels.pieces import flash_on_cpu
from llmtrain.model.kernels.segments import Segments, segments
from llmtrain.model.kernels.segments import attend as attend_within

CAUSAL = "causal"


class AlibiRow:
    """ALiBi as slope * (j - T/2), which differs from slope * (j - i) by a constant a query: the same softmax.

    Rounding grows with T (half as much as in the released code's slope * (j - T + 1)); `blockwise` keeps it small.
    """

    def __init__(self, seen: Visibility) -> None:
        assert seen.slopes is not None
        wide = torch.promote_types(seen.dtype, torch.float32)
        positions = torch.arange(seen.n_keys, device=seen.device, dtype=wide) - seen.n_keys // 2
        self.seen = seen
        self.row = torch.tensor(seen.slopes, device=seen.device, dtype=wide)[None, :, None, None] * positions

    @cached_property
    def dense(self) -> Tensor:
        """The whole bias, for dropout."""
        return dense_bias(self.seen)


def _prepare(visibility: Visibility) -> Tensor | Segments | AlibiRow | str | None:
    """A dense bias, or segments, or a row, or CAUSAL when that says it all, or None when queries see every key."""
    square = visibility.n_queries == visibility.n_keys
    on_cpu = visibility.device.type == "cpu"
    if visibility.padding is None and visibility.documents is None and visibility.window is None:
        if visibility.slopes is None and square:
            return CAUSAL
        if visibility.slopes is None and visibility.n_queries == 1:
            return None
        if visibility.slopes is not None and square and on_cpu and flash_on_cpu():
            return AlibiRow(visibility)
    if on_cpu and (documents := segments(visibility)) is not None:
        return documents  # elsewhere many small kernels would wait for each other
    bias = dense_bias(visibility)
    if on_cpu:
        return bias  # the fused CPU kernel takes a float32 bias next to bfloat16 q, k, v
    # Elsewhere the kernels want q's dtype. The lowest float32 would round to -inf there.
    return bias.clamp_(min=torch.finfo(visibility.dtype).min).to(visibility.dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Segments | AlibiRow | str | None,
    *,
    softmax_scale: float,
    dropout_p: float,
    softcap: float | None,
) -> Tensor:
    if softcap is not None:  # the model refuses it earlier, in `select`
        raise UserError("attn_logit_softcapping: torch's fused attention has none; set attn_impl to auto")
    if (
        q.shape[2] == 1
        and k.shape[1] < q.shape[1]
        and not dropout_p
        and not isinstance(bias, (Segments, AlibiRow, str))
    ):
        return _one_query(q, k, v, bias, softmax_scale)
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    # Autocast would round the float32 bias to bfloat16 on its way in; q, k and v have autocast's dtype already.
    with torch.autocast(q.device.type, enabled=False):
        if isinstance(bias, Segments):
            return attend_within(q, k, v, bias, softmax_scale=softmax_scale, dropout_p=dropout_p)
        if isinstance(bias, AlibiRow) and not dropout_p:
            row = bias.row.expand(*q.shape[:3], k.shape[2])
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(q, k, v, 0.0, True, attn_mask=row, scale=softmax_scale)[0]  # type: ignore[no-any-return]
        if isinstance(bias, AlibiRow):
            bias = bias.dense
        causal = isinstance(bias, str)
        mask = bias if isinstance(bias, Tensor) else None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale
        )


def _one_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softmax_scale: float) -> Tensor:
    """One query of each head, over fewer heads of keys: those that share one stand in the place of its queries.

    So generation does not copy all keys and values in each step and layer.
    """
    batch, heads, _, width = q.shape
    if bias is not None and bias.shape[1] == heads:
        bias = bias.reshape(len(bias), k.shape[1], -1, bias.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        together = q.reshape(batch, k.shape[1], -1, width)
        out = F.scaled_dot_product_attention(together, k, v, attn_mask=bias, scale=softmax_scale)
    return out.reshape(batch, heads, 1, width)


SDPA = Kernel("sdpa", _prepare, _attend)
