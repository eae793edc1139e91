"""Reading pickles without running them: metadata and objects of sharded checkpoints, and full ``.pt`` checkpoints.

A pickle is a program. ``torch.distributed.checkpoint`` loads ``.metadata`` with a bare ``pickle.load`` and Composer
loads full checkpoints with ``weights_only=False``; both run whatever the file says (shown by experiment). Here only
the classes that such files really consist of are known; any other name ends the reading with a message.
"""

import contextlib
import datetime
import enum
import io
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp
from torch.torch_version import TorchVersion

from llmtrain.errors import UserError
from llmtrain.inside import leads_outside, why_outside

_HOW_TO = (
    "A file of tensors has no use for it, and running it would run the file's own code, so it is not loaded. If you "
    "trust the file, convert it to safetensors where it was made."
)


def read_metadata(folder: Path) -> dcp.Metadata:
    """Read ``.metadata`` of a torch.distributed.checkpoint folder, allowing nothing but metadata in it.

    Raises:
        UserError: it is missing, damaged, or names a global that metadata does not need (the global is named), or it
            says that data lies outside the folder (Composer would download a remote checkpoint's file to there).
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            content = _MetadataUnpickler(file, path).load()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{folder}: no .metadata; this is no complete sharded checkpoint.") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{path}: cannot be read: damaged, or written by a newer torch ({type(error).__name__}: {error})."
        ) from None
    if not isinstance(content, dcp.Metadata):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of checkpoint metadata.")
    try:
        names = {str(info.relative_path) for info in (content.storage_data or {}).values()}
    except (AttributeError, TypeError):
        raise UserError(f"{path}: does not say where its data lies: damaged, or not of torch.") from None
    for name in names:
        if why_outside(name) or leads_outside(folder, name):
            raise UserError(f"{path}: points outside the checkpoint ({name[:200]}); refused.")
    return content


def load_full(path: Path) -> Any:
    """``torch.load`` of a full checkpoint with ``weights_only``, on the CPU, its tensors mapped instead of read.

    Allowed besides torch's own list: what Composer stores beside the weights (time spans, versions, numpy's random
    state).

    Raises:
        UserError: the file is damaged, or names a global outside the list (the global is named).
    """
    with torch.serialization.safe_globals(_full_checkpoint_globals()):
        try:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
        except FileNotFoundError:
            raise UserError(f"{path}: no such file.") from None
        except pickle.UnpicklingError as error:
            raise UserError(_refusal(str(path), str(path), error)) from None
        except Exception as error:  # a damaged archive can raise nearly anything
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise UserError(
                f"{path}: cannot be read, it is damaged or is no checkpoint ({type(error).__name__}: {first_line})"
            ) from None


def refuse_code(folder: Path) -> None:
    """Look through the ``.bin`` files of a model or adapters before another library opens them; runs nothing.

    transformers and PEFT open them with ``weights_only``, too, but some of their versions by default only, and their
    messages do not say what was found where. A folder with safetensors has no use for its ``.bin`` files.

    Raises:
        UserError: a file names a global outside of the list of :func:`load_full` (file and global are named).
    """
    found: list[Path] = []
    for stem in ("model", "adapter_model"):
        names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
        if not any((folder / name).is_file() for name in names):
            found += sorted(folder.glob("pytorch_model*.bin" if stem == "model" else "adapter_model*.bin"))
    for path in found:
        unsafe: list[str] = []
        # Older formats and damaged files are left to weights_only.
        with contextlib.suppress(Exception), torch.serialization.safe_globals(_full_checkpoint_globals()):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if unsafe:
            raise UserError(f"{path}: refused, it names `{'`, `'.join(sorted(set(unsafe)))}`. {_HOW_TO}")


def load_object(content: io.BytesIO, name: str, map_location: str | None = None) -> Any:
    """``torch.load`` of one object of a sharded checkpoint with ``weights_only`` and the list of :func:`load_full`.

    Args:
        content: what ``torch.save`` wrote.
        name: what messages call it.
        map_location: as in ``torch.load``.

    Raises:
        UserError: it is damaged, or names a global outside the list (the global is named).
    """
    with torch.serialization.safe_globals(_full_checkpoint_globals()):
        try:
            return torch.load(content, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(_refusal(name, content, error)) from None
        except Exception as error:
            raise UserError(f"{name}: cannot be read: damaged ({type(error).__name__}: {error})") from None


def load_pickle(content: io.BytesIO, storage: Callable[[tuple[Any, ...]], Any]) -> Any:
    """Only the pickle of what ``torch.save`` wrote, with the list of :func:`load_full`.

    Args:
        content: the archive's ``data.pkl``.
        storage: gives the storage for the identity that stands in the pickle.

    Raises:
        Exception: nearly any, when the pickle is damaged or names a global outside the list; nothing was run.
    """
    with torch.serialization.safe_globals(_full_checkpoint_globals()):
        unpickler: Any = torch._weights_only_unpickler.Unpickler(content, encoding="utf-8")
        unpickler.persistent_load = storage
        return unpickler.load()


def _refusal(name: str, file: str | io.BytesIO, error: Exception) -> str:
    unsafe: list[str] = []
    with contextlib.suppress(Exception):
        if isinstance(file, io.BytesIO):
            file.seek(0)
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if unsafe:
        return f"{name}: refused, it names `{'`, `'.join(sorted(set(unsafe)))}`. {_HOW_TO}"
    text = " ".join(str(error).split())
    marker = text.find("Unsupported")
    return f"{name}: refused: {text[marker if marker >= 0 else 0 :][:200]}. {_HOW_TO}"


def _full_checkpoint_globals() -> list[Any]:
    # numpy moved numpy.core to numpy._core; files carry either name, whichever numpy reads them.
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float32(0).__reduce__()[0]
    allowed: list[Any] = [datetime.timedelta, TorchVersion, np.ndarray, np.dtype]
    allowed += [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u8", "u4", "u1", "?")]
    for package in ("numpy.core", "numpy._core"):
        allowed.append((reconstruct, f"{package}.multiarray._reconstruct"))
        allowed.append((scalar, f"{package}.multiarray.scalar"))
    return allowed


def _member_of_enum(owner: Any, name: str) -> Any:
    """What pickled enum members may use of ``getattr`` (Python 3.11 and 3.12 pickle them so): nothing else."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError("getattr on something that is no enum")


class _MetadataUnpickler(pickle.Unpickler):
    _classes: tuple[type, ...] = (
        dcp.Metadata,
        dcp.MetadataIndex,
        dcp.TensorStorageMetadata,
        dcp.BytesStorageMetadata,
        dcp.ChunkStorageMetadata,
        dcp.TensorProperties,
        dcp._MEM_FORMAT_ENCODING,
        dcp.StorageMeta,
        filesystem._StorageInfo,
        torch.Size,
        OrderedDict,
    )

    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self._path = path
        self._allowed: dict[tuple[str, str], Any] = {(c.__module__, c.__qualname__): c for c in self._classes}
        self._allowed["torch.serialization", "_get_layout"] = torch.serialization._get_layout
        self._allowed["builtins", "getattr"] = _member_of_enum
        for module in ("pathlib", "pathlib._local"):
            # As text-only paths: a checkpoint from Windows reads on Linux, and nothing can touch the disk.
            self._allowed[module, "PosixPath"] = self._allowed[module, "PurePosixPath"] = pathlib.PurePosixPath
            self._allowed[module, "WindowsPath"] = self._allowed[module, "PureWindowsPath"] = pathlib.PureWindowsPath

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        found: Callable[..., Any] | None = self._allowed.get((module, name))
        if found is None:
            raise UserError(f"{self._path}: refused, it names `{module}.{name}`. {_HOW_TO}")
        return found
