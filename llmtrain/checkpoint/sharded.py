"""Reading tensors from a torch.distributed.checkpoint (DCP) folder in one process, whatever wrote it.

``dcp.load`` wants the whole state (optimizer included), unpickles ``.metadata`` freely and, for its byte entries, runs
``torch.load(weights_only=False)``. Here a tensor is put together from its chunks when it is asked for: no process
group, no GPU, no more memory than that tensor, and nothing but tensors is ever read.
"""

import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from llmtrain.checkpoint.unpickle import read_metadata
from llmtrain.errors import UserError


class ShardedTensors:
    """The tensors of a DCP folder by their flat name; each is read when asked for.

    Raises:
        UserError: ``.metadata`` is missing, damaged, or holds more than metadata.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._metadata = read_metadata(folder)
        self._tensors = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole tensor; reads nothing."""
        return self._tensors[name].size

    def read(self, name: str) -> Tensor:
        """Put one tensor together from the chunks that the ranks wrote; on the CPU, in the dtype that was saved.

        Raises:
            UserError: a file is missing or damaged, or the chunks do not cover the tensor.
        """
        entry = self._tensors[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            part = self._read_chunk(MetadataIndex(name, chunk.offsets))
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            fits = len(ends) == whole.dim() and all(end <= size for end, size in zip(ends, whole.shape, strict=True))
            if part.shape != chunk.sizes or part.dtype != whole.dtype or not fits:
                raise UserError(
                    f"{self.folder}: `{name}`: a chunk is {part.dtype} {tuple(part.shape)} where .metadata says "
                    f"{whole.dtype} {tuple(chunk.sizes)} of {tuple(whole.shape)}; the checkpoint is damaged."
                )
            target = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(dim, offset, size)
            target.copy_(part)
            covered += part.numel()
        if covered != whole.numel():
            raise UserError(
                f"{self.folder}: `{name}`: {covered:,} of {whole.numel():,} values are there: the checkpoint is damaged"
            )
        return whole

    def _read_chunk(self, index: MetadataIndex) -> Tensor:
        info = (self._metadata.storage_data or {}).get(index)
        if info is None:
            raise UserError(f"{self.folder}: .metadata does not say where `{index.fqn}` at {index.offset} lies.")
        name = PurePosixPath(info.relative_path)
        if transforms := getattr(info, "transform_descriptors", None):  # older versions of torch have no such field
            raise UserError(
                f"{self.folder}/{name}: written with {', '.join(transforms)}, which is not supported; "
                "save the checkpoint without extensions."
            )
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(info.offset)
                content = io.BytesIO(file.read(info.length))
            part = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports a damaged archive in many ways
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise UserError(
                f"{self.folder}/{name}: `{index.fqn}` cannot be read ({type(error).__name__}: {first_line})."
            ) from None
        if not isinstance(part, Tensor):
            raise UserError(f"{self.folder}/{name}: `{index.fqn}` is a {type(part).__name__} instead of a tensor.")
        return part
