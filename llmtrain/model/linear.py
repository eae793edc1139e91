"""Linear layers that know how they are initialised (see init.py)."""

from typing import Any

from torch import nn


class FusedLinear(nn.Linear):
    """Several projections in one matrix, stacked along the outputs: each slice has its own fan."""

    def __init__(self, in_features: int, out_features: int, *, slices: int, bias: bool, device: Any = None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.slices = slices


class ResidualLinear(nn.Linear):
    """A projection into the residual stream: initial weights are divided, so that the stream's variance stays put."""
