"""The weights of a folder that was just written, read again by the libraries that users read them with."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.weights import Joined, Weights
from llmtrain.errors import UserError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_PIECE = 16_000_000
"""Bytes that are mapped at once."""


def written_weights(folder: Path) -> Weights:
    """All tensors of the folder's weights files, by the names in them.

    Raises:
        UserError: there are none, a file cannot be read, or the index and the files do not say the same.
    """
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        files = sorted(folder.glob(f"{stem}*{suffix}"))
        if not files:
            continue
        parts: list[Weights] = [_Safetensors(f) if suffix == ".safetensors" else _torch_file(f) for f in files]
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            wanted = json.loads(index.read_text())["weight_map"]
            found = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
            if wanted != found:
                raise UserError(f"{index}: its weight_map does not say what the files hold.")
        return Joined(parts, str(folder))
    raise UserError(f"{folder}: no weights were written.")


class _Safetensors(Weights):
    """One file, by the safetensors library, which maps it: opened for each piece anew, so that no pages stay."""

    def __init__(self, path: Path):
        self._path = path
        with self._open() as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            self._shapes = {name: torch.Size(part.get_shape()) for name, part in slices.items()}
            self._dtypes = {name: _DTYPES[part.get_dtype()] for name, part in slices.items()}
        super().__init__(self._shapes)

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path}: cannot be read, the file is damaged ({error}).") from None

    def __getitem__(self, name: str) -> Tensor:
        whole = torch.empty(self._shapes[name], dtype=self._dtypes[name])
        if whole.dim() == 0:
            with self._open() as file:
                return file.get_tensor(name).clone()  # type: ignore[no-any-return]
        rows = max(1, _PIECE * len(whole) // max(1, whole.nbytes))
        for first in range(0, len(whole), rows):
            with self._open() as file:
                whole[first : first + rows] = file.get_slice(name)[first : first + rows]
        return whole

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]


def _torch_file(path: Path) -> Weights:
    from llmtrain.checkpoint.torch_file import open_torch_file
    from llmtrain.checkpoint.unpickle import load_full
    from llmtrain.checkpoint.weights import InMemory

    return open_torch_file(path) or InMemory(load_full(path))
