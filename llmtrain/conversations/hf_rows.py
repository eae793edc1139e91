"""Rows of what `datasets.load_dataset` opens (the hub, local folders, builders with `data_files`); object stores."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.conversations.files import SUFFIXES, contents_hash, file_rows, identity_of_files
from llmtrain.conversations.messages import BadExample
from llmtrain.conversations.row import Row
from llmtrain.errors import UserError
from llmtrain.foreign_datasets import load_dataset
from llmtrain.redaction import redact

_BUILDERS = {"json", "csv", "parquet"}
_URI = re.compile(r"^[a-z][a-z0-9+-]*:/")
_REFUSED = ("streaming", "split", "trust_remote_code")


def hf_rows(
    hf_name: str,
    split: str = "train",
    hf_kwargs: Mapping[str, Any] | None = None,
    safe_load: bool = False,
) -> Iterator[Row]:
    """The rows of a dataset, streamed: nothing is converted or cached by `datasets`.

    Local files of the builders `json`, `csv` and `parquet` are read by `file_rows`, so that a malformed row costs
    itself alone. An object-store folder (`s3://bucket/folder`) must hold `SPLIT.jsonl`, `.json`, `.csv` or `.parquet`,
    as for llm-foundry; it is downloaded once.

    Args:
        hf_name: a name on the hub, a local folder, a builder with `data_files` in `hf_kwargs`, or a URI.
        split: also `train[:1%]` and the like, which cannot be streamed and so is loaded as a whole.
        hf_kwargs: further arguments of `load_dataset`.
        safe_load: take data files only; a local folder that holds others is refused.

    Raises:
        UserError: it cannot be opened or read. Code of a dataset is never run.
    """
    kwargs = dict(hf_kwargs or {})
    split = split or "train"
    refused = [key for key in _REFUSED if key in kwargs]
    if refused:
        raise UserError(f"hf_kwargs may not set {', '.join(refused)}")
    files = _local_files(hf_name, split, kwargs)
    if files is not None:
        yield from file_rows(files)
    elif _URI.match(hf_name) and not hf_name.startswith("hf://"):
        yield from file_rows([_download_split(hf_name, split)])
    else:
        yield from _load(hf_name, split, kwargs, safe_load)


def identity_of_dataset(
    hf_name: str,
    split: str = "train",
    hf_kwargs: Mapping[str, Any] | None = None,
    safe_load: bool = False,
    *,
    ask_hub: bool = True,
) -> str:
    """Text that changes when the rows of a dataset do: for the keys of caches.

    Files on this machine count by their contents; a dataset of the hub by its commit, or by its name alone where the
    hub cannot be reached; an object store by its URI: what it holds is downloaded once and then taken to stay the same.

    Args:
        hf_name: see `hf_rows`.
        split: see `hf_rows`.
        hf_kwargs: see `hf_rows`.
        safe_load: see `hf_rows`.
        ask_hub: look up the commit; otherwise a dataset of the hub counts by its name.

    Raises:
        UserError: a local file is not there.
    """
    kwargs = dict(hf_kwargs or {})
    # Data are the same whoever asks, and this text is written beside what is made of them.
    asked = json.dumps([hf_name, split or "train", redact(kwargs), safe_load], sort_keys=True, default=str)
    files = _local_files(hf_name, split or "train", kwargs)
    folder = Path(hf_name).expanduser()
    if files is not None:
        return identity_of_files(files)
    if folder.is_dir():
        inside = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
        return f"{asked} {contents_hash(list(inside))}"
    if hf_name in _BUILDERS or _URI.match(hf_name) or not ask_hub:
        return asked
    return f"{asked} {_commit(hf_name, kwargs.get('revision'))}"


def _commit(hf_name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(hf_name, revision=revision, timeout=10).sha)
    except Exception:  # offline, or not allowed to ask: opening the dataset will tell, where it matters
        return "unknown commit"


def _local_files(hf_name: str, split: str, kwargs: dict[str, Any]) -> list[str] | None:
    """The files that a builder would read here on this machine; None when it is not as simple as that."""
    if hf_name not in _BUILDERS or set(kwargs) != {"data_files"}:
        return None
    data_files = kwargs["data_files"]
    if isinstance(data_files, Mapping):
        if split not in data_files:
            raise UserError(f"hf_kwargs.data_files has no split {split!r}; it has {', '.join(map(str, data_files))}")
        data_files = data_files[split]
    elif split != "train":
        return None  # datasets' own rule: without names for the splits there is one, "train"
    names = [data_files] if isinstance(data_files, str) else data_files
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return None
    simple = all(not _URI.match(name) and Path(name).name.endswith(_names_of(hf_name)) for name in names)
    return list(names) if simple else None


def _names_of(builder: str) -> tuple[str, ...]:
    suffixes = (".json", ".jsonl") if builder == "json" else (f".{builder}",)
    packed = ("",) if builder == "parquet" else ("", ".gz", ".zst")
    return tuple(suffix + end for suffix in suffixes for end in packed)


def _load(hf_name: str, split: str, kwargs: dict[str, Any], safe_load: bool) -> Iterator[Row]:
    where = f"{hf_name}[{split}]"
    folder = Path(hf_name).expanduser()
    try:
        if safe_load and hf_name not in _BUILDERS:
            folder = _only_data(hf_name, folder, kwargs)
        name = str(folder) if folder.is_dir() else hf_name
        iterator = iter(load_dataset(name, split=split, streaming="[" not in split, **kwargs))
    except UserError as problem:
        raise UserError(f"hf_name: {problem}" if not str(problem).startswith("safe_load") else str(problem)) from None
    except Exception as problem:  # it raises whatever its back-ends raise
        raise UserError(f"hf_name: the dataset {where} cannot be opened: {_first_line(problem)}") from problem
    number = 0
    while True:
        place = f"{where}, row {number}"
        try:
            data = next(iterator)
        except StopIteration:
            return
        except UnicodeDecodeError as problem:
            raise UserError(f"{place}: not UTF-8: {problem}. {_FILES_HINT}") from problem
        except Exception as problem:
            raise UserError(f"{place}, or soon after it: {_first_line(problem)}. {_FILES_HINT}") from problem
        if isinstance(data, Mapping):
            yield Row(place, number, data, None)
        else:
            yield Row(place, number, None, BadExample("not an object", f"found {type(data).__name__}"))
        number += 1


_FILES_HINT = "To read past malformed rows of local files, name the files (files: [...]) instead of the dataset"


def _only_data(hf_name: str, folder: Path, kwargs: dict[str, Any]) -> Path:
    """A folder with data files alone, downloaded when it is not here."""
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        login = {key: kwargs[key] for key in ("token", "revision") if key in kwargs}
        return Path(snapshot_download(hf_name, repo_type="dataset", allow_patterns=patterns, **login))
    hidden = {".gitignore", ".gitattributes", "README.md"}
    others = sorted(
        path.name
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
        and path.suffix not in SUFFIXES
        and path.name not in hidden
    )
    if others:
        kinds = ", ".join(SUFFIXES)
        raise UserError(f"safe_load: {folder} holds more than {kinds}: {', '.join(others[:5])}")
    return folder


def _download_split(uri: str, split: str) -> Path:
    """The file of a split in an object-store folder, in the cache; fetched when it is not there yet."""
    from streaming.base.storage import CloudDownloader

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llmtrain" / "datasets"
    folder = cache / hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:16]
    tried = []
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        target = folder / f"{split}{suffix}"
        if target.is_file():
            return target
        partial = folder / f".{os.getpid()}.{target.name}"
        try:
            CloudDownloader.direct_download(f"{uri.rstrip('/')}/{target.name}", str(partial), timeout=3600)
            partial.replace(target)
        except Exception as problem:  # each store has exceptions of its own, and "not found" has no common one
            tried.append(f"{target.name}: {_first_line(problem)}")
            partial.unlink(missing_ok=True)
        else:
            return target
    raise UserError(f"hf_name: {uri} holds none of the files of split {split!r} ({'; '.join(tried)})")


def _first_line(problem: BaseException) -> str:
    cause = problem.__cause__ or problem
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}".rstrip(": ")
