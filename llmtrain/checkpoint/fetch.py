"""Weights to start from, wherever they are: a local path, the Hugging Face hub, an object store. Light.

Neither the hub nor an object store is asked for a list of files: the names follow from config.json and the weights'
index, or from a checkpoint's manifest. So nothing else is downloaded (no code above all, no second copy of the weights
in another format), and a bucket needs no permission to list.
"""

import hashlib
import os
import shutil
import tempfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from llmtrain.checkpoint import manifest
from llmtrain.errors import UserError
from llmtrain.inside import why_outside
from llmtrain.json_text import parse_json

Get = Callable[[str], Path | None]
"""Fetches one file by name: its local path, or None where there is no such file."""

WEIGHTS = (
    # In the order of transformers: where several are there, all of them read the same. Nothing to unpickle comes first.
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Everything else that may lie in a tokenizer's folder (code above all) stays there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_OPTIONAL = ("generation_config.json", *TOKENIZER_FILES)
_TIMEOUT = 3600.0
"""Seconds for one file of an object store."""


def is_uri(source: str) -> bool:
    """Whether it names an object store (s3://, gs://, file://, ...)."""
    return "://" in source


def local_path(source: str) -> Path | None:
    """The local file or folder that is meant, or None for a URI or a name on the hub.

    Raises:
        UserError: it can only be a path, and nothing is there.
    """
    path = Path(source).expanduser()
    if is_uri(source):
        return None
    with suppress(OSError):  # too long for a name
        if path.exists():
            return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(".pt"):
        raise UserError(f"model.pretrained: nothing is at {source!r} (from {Path.cwd()}).")
    return None


def fetch(source: str) -> Path:
    """A local folder or file with the weights, downloaded when they are elsewhere (and not again the next time).

    Args:
        source: A local path; a name on the hub, `owner/name` or `owner/name@revision`; or a URI of a Hugging Face
            folder, of a checkpoint's folder, or of a `.pt` file. From a URI things go to
            `$XDG_CACHE_HOME/llmtrain/pretrained` (`~/.cache/...`), under a temporary name until they are complete.

    Raises:
        UserError: nothing usable there, or it cannot be reached.
    """
    path = local_path(source)
    if path is not None:
        return path
    if not is_uri(source):
        return _hugging_face_folder(_from_hub(source), source)
    target = cached(source)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.downloading-{uuid.uuid4().hex[:8]}"
    try:
        made = _from_uri(source, staging)
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not target.exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


@contextmanager
def config_file(source: str) -> Iterator[Path | None]:
    """The config.json (or manifest.json) of something that is not local, and nothing else of it; None without any."""
    if not is_uri(source):
        yield _from_hub(source)("config.json")
        return
    if cached(source).exists() or source.endswith(".pt"):
        yield next(filter(Path.is_file, (cached(source) / n for n in ("config.json", manifest.MANIFEST))), None)
        return
    with tempfile.TemporaryDirectory(prefix="llmtrain-config-") as folder:
        get = _from_store(source, Path(folder))
        yield get("config.json") or get(manifest.MANIFEST)


def cached(uri: str) -> Path:
    """Where a URI's files are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "llmtrain" / "pretrained"
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    return cache / f"{hashlib.sha256(uri.rstrip('/').encode()).hexdigest()[:16]}-{name}"


def _from_uri(uri: str, staging: Path) -> Path:
    """Downloads everything that is needed; returns the folder, or the `.pt` file."""
    if uri.endswith(".pt"):
        parent, name = uri.rsplit("/", 1)
        file = _from_store(parent, staging)(name)
        if file is None:
            raise UserError(f"model.pretrained: {uri}: there is no such file, or it must not be read.")
        return file
    get = _from_store(uri, staging)
    if get("config.json") is not None:
        return _hugging_face_folder(get, uri)
    if get(manifest.MANIFEST) is not None:
        names = list(manifest.read(staging).files)
    elif get(".metadata") is not None:
        from llmtrain.checkpoint.unpickle import read_metadata

        stored = read_metadata(staging).storage_data or {}
        names = sorted({str(info.relative_path) for info in stored.values()})
    else:
        raise UserError(
            f"model.pretrained: {uri} holds no config.json (a Hugging Face folder), no {manifest.MANIFEST} or "
            ".metadata (a checkpoint), or they must not be read. Give one of those, or the URI of a .pt file."
        )
    for name in names:
        if get(name) is None:
            raise UserError(f"model.pretrained: {uri}: {name} is missing, or must not be read.")
    return staging


def _hugging_face_folder(get: Get, source: str) -> Path:
    """Fetches config, weights and tokenizer of a Hugging Face folder; returns the folder."""
    config = get("config.json")
    if config is None:
        raise UserError(f"model.pretrained: {source} has no config.json.")
    for name in _OPTIONAL:
        get(name)
    first = next(filter(None, map(get, WEIGHTS)), None)
    if first is None:
        raise UserError(f"model.pretrained: {source} has no weights ({WEIGHTS[0]} or {WEIGHTS[2]}, or their index).")
    if first.suffix == ".json":
        names = _named_in(first)
        with ThreadPoolExecutor(4) as pool:
            for name, found in zip(names, pool.map(get, names), strict=True):
                if found is None:
                    raise UserError(f"model.pretrained: {source}: {name} is missing, but named in {first.name}.")
    return config.parent


def _named_in(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: has no weight_map.") from None
    if unsafe := [name for name in names if why_outside(name) or Path(name).name != name]:
        raise UserError(f"{index}: `{unsafe[0]}` is no name of a file in this folder; refused.")
    return names


def _from_hub(source: str) -> Get:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")

    def get(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, revision=revision or None))
        except LocalEntryNotFoundError as problem:  # a subclass of EntryNotFoundError: offline, and not in the cache
            if file == "config.json":
                raise UserError(
                    f"model.pretrained: {source!r} is no local path, is not in the local cache of the hub, and the hub "
                    f"cannot be reached. Give a local folder, or download it first where there is a network: "
                    f"hf download {name}"
                ) from problem
            return None
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as problem:
            reason = str(problem).strip().splitlines()[0] if str(problem).strip() else repr(problem)
            raise UserError(
                f"model.pretrained: {source!r} is no local path, and cannot be fetched from the hub: {reason}"
            ) from problem

    return get


def _from_store(uri: str, folder: Path) -> Get:
    def get(file: str) -> Path | None:
        target = folder / file
        if target.is_file():
            return target
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"model.pretrained: {uri} names a file outside of itself ({file}); refused.")
        target.parent.mkdir(parents=True, exist_ok=True)
        remote = f"{uri.rstrip('/')}/{file}"
        try:
            _download(remote, target)
        except Exception as problem:  # each store's client has errors of its own
            target.unlink(missing_ok=True)
            if _says_missing(problem):
                return None
            reason = str(problem).strip().splitlines()[0] if str(problem).strip() else repr(problem)
            raise UserError(f"model.pretrained: {remote} cannot be downloaded: {reason}") from problem
        return target

    return get


def _download(remote: str, target: Path) -> None:
    """Through Streaming's client for the store (S3, GCS, Azure, OCI, ...), or the standard library's."""
    if urllib.parse.urlparse(remote).scheme in ("file", "http", "https"):
        with urllib.request.urlopen(remote, timeout=60) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 8 * 1024 * 1024)
            size, promised = file.tell(), source.headers.get("Content-Length")
        if promised is not None and size != int(promised):
            raise OSError(f"the connection ended after {size:,} of {int(promised):,} bytes")
        return
    from streaming.base.storage.download import CloudDownloader

    CloudDownloader.direct_download(remote, str(target), _TIMEOUT)


def _says_missing(problem: Exception) -> bool:
    """Whether there is no such file; 403 says so, too, where files may be read but not listed (S3)."""
    if isinstance(problem, FileNotFoundError) or getattr(problem, "code", None) in (403, 404):
        return True
    if isinstance(getattr(problem, "reason", None), FileNotFoundError):  # of file://
        return True
    answer = getattr(problem, "response", None)  # botocore's
    code = str(answer.get("Error", {}).get("Code")) if isinstance(answer, dict) else ""
    return code in ("403", "404", "AccessDenied", "NoSuchKey", "NotFound") or type(problem).__name__ in (
        "NotFound",
        "ResourceNotFoundError",
    )
