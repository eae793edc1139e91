"""Attention as written in the paper: the reference that the other kernels are tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.kernels.dense import dense_bias
from llmtrain.model.kernels.interface import Kernel, repeat_kv


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, softmax_scale: float, dropout_p: float, softcap: float | None
) -> Tensor:
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    scores = (q @ k.transpose(-2, -1)) * softmax_scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # The bias is float32 at least, and so is the softmax.
    weights = F.dropout(torch.softmax(scores + bias, dim=-1), dropout_p)
    return weights.to(v.dtype) @ v


EAGER = Kernel("eager", dense_bias, _attend)
