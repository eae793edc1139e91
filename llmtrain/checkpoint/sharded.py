"""Reading tensors from a torch.distributed.checkpoint (DCP) folder in one process, whatever wrote it.

``dcp.load`` wants the whole state (optimizer included), unpickles ``.metadata`` freely and, for its byte entries, runs
``torch.load(weights_only=False)``. Here a tensor is put together from its chunks when it is asked for: no process
group, no GPU, no more memory than that tensor (and a chunk, where chunks are no whole rows), and nothing but tensors is
ever read.
"""

import io
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from llmtrain.checkpoint.torch_file import Archive, UnknownLayoutError
from llmtrain.checkpoint.unpickle import load_object, read_metadata
from llmtrain.checkpoint.weights import Weights
from llmtrain.errors import UserError


class ShardedTensors(Weights):
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
        super().__init__(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole tensor; reads nothing."""
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor; reads nothing."""
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> Tensor:
        """Put one tensor together from the chunks that the ranks wrote; on the CPU, in the dtype that was saved.

        Raises:
            UserError: a file is missing or damaged, or the chunks do not cover the tensor.
        """
        entry = self._tensors[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            fits = len(ends) == whole.dim() and all(end <= size for end, size in zip(ends, whole.shape, strict=True))
            if not fits:
                raise self._another_chunk(name, whole, None, chunk.sizes)
            target = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(dim, offset, size)
            self._read_chunk(MetadataIndex(name, chunk.offsets), target)
            covered += target.numel()
        if covered != whole.numel():
            raise UserError(
                f"{self.folder}: `{name}`: {covered:,} of {whole.numel():,} values are there: the checkpoint is damaged"
            )
        return whole

    def _another_chunk(self, name: str, wanted: Tensor, found: Tensor | None, sizes: torch.Size) -> UserError:
        is_there = "beyond the tensor" if found is None else f"{found.dtype} {tuple(found.shape)}"
        return UserError(
            f"{self.folder}: `{name}`: a chunk is {is_there} where .metadata says {wanted.dtype} {tuple(sizes)} of "
            f"{tuple(self._tensors[name].size)}; the checkpoint is damaged."
        )

    def _read_chunk(self, index: MetadataIndex, target: Tensor) -> None:
        """Fill a part of the whole tensor with what one rank wrote."""
        info = (self._metadata.storage_data or {}).get(index)
        if info is None:
            raise UserError(f"{self.folder}: .metadata does not say where `{index.fqn}` at {index.offset} lies.")
        name = PurePosixPath(info.relative_path)
        if transforms := getattr(info, "transform_descriptors", None):  # older versions of torch have no such field
            raise UserError(
                f"{self.folder}/{name}: written with {', '.join(transforms)}, which is not supported; "
                "save the checkpoint without extensions."
            )
        path = self.folder / name
        try:
            archive: Archive | None = (opened := Archive(path, info.offset, info.length))
            part = opened.content
        except UnknownLayoutError:  # torch itself may know it, or say what is wrong
            archive = None
            part = _load(path, info.offset, info.length, index.fqn)
        if not isinstance(part, Tensor):
            raise UserError(f"{path}: `{index.fqn}` is a {type(part).__name__} instead of a tensor.")
        if part.shape != target.shape or part.dtype != target.dtype:
            raise self._another_chunk(index.fqn, target, part, target.shape)
        if archive is None:
            target.copy_(part)
        elif target.is_contiguous():
            archive.read(part, into=target)
        else:
            target.copy_(archive.read(part))


def _load(path: Path, offset: int, length: int, name: str) -> object:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: `{name}` cannot be read ({type(error).__name__}: {error.strerror}).") from None
    return load_object(content, f"{path}: `{name}`", "cpu")
