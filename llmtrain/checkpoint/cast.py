"""Weights in another dtype, and the check that they survive it."""

from pathlib import Path

import torch
from torch import Tensor

from llmtrain.checkpoint.weights import Renamed, Weights
from llmtrain.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Cast(Renamed):
    """Other weights, cast as they are read.

    Args:
        inner: What is read.
        dtype: Name of the dtype to have; None keeps what each tensor has.
        where: Of what messages speak.
    """

    def __init__(self, inner: Weights, dtype: str | None, where: Path):
        super().__init__(inner, {name: name for name in inner})
        self._dtype = None if dtype is None else DTYPES[dtype]
        self._dtype_name, self._where = dtype, where

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            UserError: a value is not finite, before the cast or after it.
        """
        value = super().__getitem__(name)
        cast = value if self._dtype is None else value.to(self._dtype)
        if not all_finite(cast):
            if all_finite(value):
                raise UserError(
                    f"{self._where}: `{name}` does not fit into {self._dtype_name} (it overflows); use bfloat16 or "
                    "float32."
                )
            raise UserError(
                f"{self._where}: `{name}` holds NaN or infinity: the training broke; take an older checkpoint."
            )
        return cast

    def dtype(self, name: str) -> torch.dtype:
        """The one to have; reads nothing."""
        return super().dtype(name) if self._dtype is None else self._dtype


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; without the copies of the whole that ``isfinite`` makes."""
    if tensor.numel() == 0:
        return True
    smallest, largest = torch.aminmax(tensor)  # NaN comes through
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))
