"""Attention as written in the paper: the reference that the other kernels are tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.kernels.dense import dense_bias
from llmtrain.model.kernels.interface import Kernel


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, softmax_scale: float, dropout_p: float) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * softmax_scale + bias  # the bias is float32 at least, and so is the softmax
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p)
    return weights.to(v.dtype) @ v


EAGER = Kernel("eager", dense_bias, _attend)
