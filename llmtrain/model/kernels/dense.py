"""The whole (queries x keys) bias as one tensor, for kernels that add it to the scores."""

import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model.alibi import distances
from llmtrain.model.kernels.interface import Visibility

LONGEST = 8192
"""Above LONGEST x LONGEST scores a dense bias is refused: at 8192 tokens it already takes 256 MB a head in float32."""


def dense_bias(visibility: Visibility) -> Tensor:
    """ALiBi, causality, padding and documents as a bias on the scores, in float32 (float64 for a float64 model).

    Returns (1 or batch, 1 or heads, n_queries, n_keys). Forbidden pairs hold a huge negative number instead of -inf:
    a fused kernel that walks over keys in blocks meets blocks that are forbidden altogether, where -inf - -inf is NaN.
    Raises UserError above LONGEST x LONGEST.
    """
    n_queries, n_keys = visibility.n_queries, visibility.n_keys
    if n_queries * n_keys > LONGEST**2:
        raise UserError(
            f"attention over {n_keys} tokens would need a dense bias (ALiBi, padding or documents), which is limited "
            f"to {LONGEST} tokens: set attn_config.attn_impl to auto, blockwise or flex, which need none, or "
            f"max_seq_len to {LONGEST} or less"
        )
    dtype = torch.float64 if visibility.dtype == torch.float64 else torch.float32
    forbidden = torch.finfo(dtype).min
    bias = distances(n_queries, n_keys, device=visibility.device, dtype=dtype)
    future = bias > 0
    if visibility.window is not None:
        future |= bias < -visibility.window
    if visibility.slopes is None:
        bias = torch.zeros_like(bias)
    bias.masked_fill_(future, forbidden)
    if visibility.slopes is not None:
        # Slopes are below 1, so slope * forbidden does not overflow and is still out of reach of any score.
        bias = torch.tensor(visibility.slopes, device=visibility.device, dtype=dtype)[:, None, None] * bias
    else:
        bias = bias[None]

    hidden = None  # (batch, n_queries, n_keys): pairs that this row's padding or documents forbid
    if visibility.padding is not None:
        hidden = ~visibility.padding[:, None, :]
    if visibility.documents is not None:
        own = visibility.documents[:, n_keys - n_queries :, None]
        others = own != visibility.documents[:, None, :]
        hidden = others if hidden is None else hidden | others
    if hidden is None:
        return bias[None]
    itself = torch.eye(n_keys, dtype=torch.bool, device=visibility.device)[n_keys - n_queries :]
    return bias[None].masked_fill((hidden & ~itself)[:, None], forbidden)
