"""torch's fused scaled_dot_product_attention, with the bias in the cheapest form that it takes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.kernels.dense import dense_bias
from llmtrain.model.kernels.interface import Kernel, Visibility, repeat_kv
from llmtrain.model.kernels.segments import Segments, segments
from llmtrain.model.kernels.segments import attend as attend_within

CAUSAL = "causal"


def _prepare(visibility: Visibility) -> Tensor | Segments | str | None:
    """A dense bias, or segments, or CAUSAL when that says it all, or None when every query sees every key."""
    if (
        visibility.slopes is None
        and visibility.padding is None
        and visibility.documents is None
        and visibility.window is None
    ):
        if visibility.n_queries == visibility.n_keys:
            return CAUSAL
        if visibility.n_queries == 1:
            return None
    if visibility.device.type == "cpu" and (documents := segments(visibility)) is not None:
        return documents  # elsewhere many small kernels would wait for each other
    bias = dense_bias(visibility)
    if visibility.device.type == "cpu":
        return bias  # the fused CPU kernel takes a float32 bias next to bfloat16 q, k, v
    # Elsewhere the kernels want q's dtype. The lowest float32 would round to -inf there.
    return bias.clamp_(min=torch.finfo(visibility.dtype).min).to(visibility.dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Segments | str | None,
    *,
    softmax_scale: float,
    dropout_p: float,
    softcap: float | None,
) -> Tensor:
    if softcap is not None:
        raise ValueError("torch's fused attention has no soft-capping")
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    causal = isinstance(bias, str)
    mask = bias if isinstance(bias, Tensor) else None
    # Autocast would round the float32 bias to bfloat16 on its way in; q, k and v have autocast's dtype already.
    with torch.autocast(q.device.type, enabled=False):
        if isinstance(bias, Segments):
            return attend_within(q, k, v, bias, softmax_scale=softmax_scale, dropout_p=dropout_p)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale
        )


SDPA = Kernel("sdpa", _prepare, _attend)
