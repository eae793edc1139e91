"""What a source consists of: its files, and the pieces that they are read in."""

import glob
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

from llmtrain.compressed import is_compressed
from llmtrain.errors import UserError
from llmtrain.prep.caps import up_to_cap
from llmtrain.prep.config import SourceConfig, SourcePlace
from llmtrain.prep.plan import InputFile, Piece
from llmtrain.prep.readers import kind_of
from llmtrain.prep.readers.files import opened
from llmtrain.prep.readers.hugging_face import n_shards
from llmtrain.prep.readers.parquet import text_bytes
from llmtrain.prep.storage import glob_files, is_remote


def pieces_of(source: SourceConfig, partition_bytes: int, on_error: Literal["fail", "skip"] = "fail") -> list[Piece]:
    """A source in pieces of at most about `partition_bytes`, in the order in which they are read.

    Large jsonl files are cut by byte ranges and large parquet files by row groups; other files, compressed ones among
    them, are a piece each, and so are the files that are joined to one document. A dataset of the hub has a piece for
    each of its shards.

    With a cap (`max_documents`, `max_bytes`) the source is read here up to it, once more than without: see `up_to_cap`.

    Args:
        source: the source.
        partition_bytes: most bytes in a piece, measured as Piece.size is.
        on_error: the recipe's; decides whether what is bad is counted or raises.

    Raises:
        UserError: no file matches, or the dataset cannot be opened; with a cap also what `read_piece` raises.
    """
    capped = source.max_documents is not None or source.max_bytes is not None
    if source.hf_name is not None:
        if capped:
            return [Piece((), max_documents=source.max_documents, max_bytes=source.max_bytes)]
        n = n_shards(source)
        return [Piece((), "shard", shard, n) for shard in range(n)]
    files = input_files(source)
    if source.join is not None:
        pieces = [Piece(group, size=sum(file.size for file in group)) for group in _groups(source, files)]
    else:
        pieces = [piece for file in files for piece in _pieces_of_file(source, file, partition_bytes)]
    return list(up_to_cap(source, pieces, on_error)) if capped else pieces


def input_bytes(sources: Iterable[SourceConfig]) -> int:
    """Size of all files as they lie there, compressed or not; a dataset of the hub counts nothing.

    Raises:
        UserError: a pattern matches no file.
    """
    return sum(file.size for source in sources if source.files is not None for file in input_files(source))


def input_files(source: SourcePlace) -> list[InputFile]:
    """The files of a source, in the order in which they are read; none for a Hugging Face dataset.

    Their names are their paths from the first folder of the pattern that a wildcard stands in.

    Raises:
        UserError: a pattern matches no file.
    """
    found: dict[str, InputFile] = {}
    for pattern in source.files or []:
        expanded = _expand(pattern)
        # The part before the first wildcard differs between machines; the shuffled order must not.
        root = re.split(r"[*?[]", expanded, maxsplit=1)[0].rpartition("/")[0] + "/"
        matches = _matches(expanded)
        if not matches:
            where = "" if is_remote(expanded) else f" (from {Path.cwd()})"
            raise UserError(f"source {source.name!r}: no file matches {expanded!r}{where}")
        for path, size, mtime in matches:
            absolute = path if is_remote(path) else str(Path(path).absolute())  # a worker may have another folder
            found[path] = InputFile(absolute, path.removeprefix(root), size, mtime)
    exclude = [_expand(pattern) for pattern in source.exclude]
    kept = {path: file for path, file in found.items() if not any(fnmatch(path, pattern) for pattern in exclude)}
    if source.files and not kept:
        raise UserError(f"source {source.name!r}: exclude leaves none of the {len(found)} files")
    ordered = sorted(kept, key=lambda path: path.split("/"))
    unique = list({kept[path].path: kept[path] for path in ordered}.values())
    if source.order == "shuffled":
        return sorted(unique, key=lambda file: hashlib.sha256(file.name.encode(errors="surrogatepass")).digest())
    return unique


def named_files_of(source: SourcePlace) -> dict[Path, str]:
    """The files of a source on this machine, with their names (see `input_files`).

    Raises:
        UserError: a pattern matches no file, or is a URL.
    """
    for pattern in source.files or []:
        if is_remote(pattern):
            raise UserError(f"source {source.name!r}: {pattern} is a URL; conversations are read from local files")
    return {Path(file.path): file.name for file in input_files(source)}


def files_of(source: SourcePlace) -> list[Path]:
    """The files of a source on this machine, in the order in which they are read.

    Raises:
        UserError: see `named_files_of`.
    """
    return list(named_files_of(source))


def describe_inputs(source: SourcePlace, out: str | None = None) -> dict[str, Any]:
    """What a later run compares to see whether the inputs are still the same: names and sizes of the files.

    Args:
        source: the source.
        out: absolute path or URL of the output; its own files are no input.

    Raises:
        UserError: no file matches, or one is of the output.
    """
    if source.hf_name is not None:
        return {"hf_name": source.hf_name, "split": source.split}
    files = input_files(source)
    own = None if out is None else next((file for file in files if file.path.startswith(f"{out.rstrip('/')}/")), None)
    if own is not None:
        raise UserError(
            f"source {source.name!r} reads {own.path}, which is of the output ({out}): "
            "`exclude` it, or choose another `out`"
        )
    sizes = [(file.path.rpartition("/")[2], file.size) for file in files]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return {"files": len(files), "bytes": sum(size for _, size in sizes), "names_and_sizes": digest}


def _expand(pattern: str) -> str:
    if is_remote(pattern):
        return pattern
    return str(Path(pattern.replace("{stdlib}", sysconfig.get_path("stdlib"))).expanduser())


def _matches(pattern: str) -> list[tuple[str, int, int]]:
    """Path, size and time of change (ns) of what matches."""
    if is_remote(pattern):
        return [(file.url, file.size, file.mtime) for file in glob_files(pattern)]
    found = []
    literal = Path(pattern).is_file()  # its name may have brackets in it
    for name in [pattern] if literal else glob.glob(pattern, recursive=True):  # noqa: PTH207  (no absolute ones there)
        try:
            stat = Path(name).stat()
        except OSError:  # a link that leads nowhere is not passed over: whoever reads it says so
            found.append((name, 0, 0))
        else:
            if S_ISREG(stat.st_mode):
                found.append((name, stat.st_size, stat.st_mtime_ns))
    return found


def _groups(source: SourceConfig, files: list[InputFile]) -> list[tuple[InputFile, ...]]:
    """The files that make one document each time: one, or all of a folder in the order of their paths."""
    groups: dict[str, list[InputFile]] = {}
    for file in files:
        first, _, deeper = file.name.partition("/")
        in_folder = source.join == "folder" and deeper
        groups.setdefault(file.path.removesuffix(file.name) + first if in_folder else file.path, []).append(file)
    return [tuple(sorted(group, key=lambda file: file.path.split("/"))) for group in groups.values()]


def _pieces_of_file(source: SourceConfig, file: InputFile, partition_bytes: int) -> Iterator[Piece]:
    kind = kind_of(source, file)
    if file.size > partition_bytes and kind == "jsonl" and not is_compressed(file.name):
        n = -(-file.size // partition_bytes)
        ends = [file.size * i // n for i in range(n + 1)]
        for start, stop in pairwise(ends):
            yield Piece((file,), "bytes", start, stop, size=stop - start)
    elif file.size > partition_bytes and kind == "parquet":
        yield from _row_groups(source, file, partition_bytes)
    else:
        yield Piece((file,), size=file.size)


def _row_groups(source: SourceConfig, file: InputFile, partition_bytes: int) -> Iterator[Piece]:
    """Row groups that follow each other, as many as have no more text than a piece should, but at least one."""
    import pyarrow
    import pyarrow.parquet

    try:
        with opened(file) as data:
            metadata = pyarrow.parquet.ParquetFile(data, pre_buffer=False).metadata
            sizes = [text_bytes(metadata, group, source.text_column) for group in range(metadata.num_row_groups)]
    except (OSError, pyarrow.ArrowException):
        sizes = []
    if not any(sizes):
        yield Piece((file,), size=file.size)  # whoever reads it says what is wrong with it
        return
    start = size = 0
    for i, more in enumerate(sizes):
        if i > start and size + more > partition_bytes:
            yield Piece((file,), "row_groups", start, i, size=size)
            start, size = i, 0
        size += more
    yield Piece((file,), "row_groups", start, len(sizes), size=size)
