"""Rows of jsonl, json, csv and parquet files: a malformed row is reported in its place, and the next one read."""

import csv
import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from llmtrain.compressed import bare_suffix, open_bytes
from llmtrain.conversations.messages import BadExample
from llmtrain.conversations.row import Row
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Kinds of files that `file_rows` reads; all but parquet also with `.gz` or `.zst` behind."""

_CHUNK = 1 << 20
_ESCAPED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are no UTF-8


def file_rows(paths: Sequence[str | Path]) -> Iterator[Row]:
    """The rows of some files, in the order in which the files are given (those of a glob by name).

    `.jsonl` has an object a line, `.json` the same or one array of objects, `.csv` a header, `.parquet` columns.

    Raises:
        UserError: a pattern matches no file, a file is of another kind, cannot be read, or is truncated.
    """
    for path in expand(paths):
        try:
            yield from _read(path)
        except (OSError, EOFError) as problem:
            raise UserError(f"{path} cannot be read: {problem}") from problem


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """The files that paths and globs (`**` for any depth) name, each once.

    Raises:
        UserError: a pattern matches no file, or a file is of a kind that cannot be read.
    """
    found: dict[Path, None] = {}
    for pattern in paths:
        text = str(Path(pattern).expanduser())
        literal = Path(text)  # a name with brackets in it is also a glob
        names = [text] if literal.is_file() else sorted(glob.glob(text, recursive=True))  # noqa: PTH207
        matches = [Path(name) for name in names if Path(name).is_file()]
        if not matches:
            hint = f" It is a folder: write {text}/*.jsonl" if literal.is_dir() else ""
            raise UserError(f"files: no file matches {text!r} (from {Path.cwd()}).{hint}")
        found.update(dict.fromkeys(matches))
    for path in found:
        if bare_suffix(path) not in SUFFIXES:
            kinds = ", ".join(SUFFIXES)
            raise UserError(f"files: {path} is none of {kinds} (.gz and .zst are decompressed): exclude or rename it")
    return list(found)


def identity_of_files(paths: Sequence[str | Path]) -> str:
    """`contents_hash` of the files that paths and globs name.

    Raises:
        UserError: see `expand`.
    """
    return contents_hash(expand(paths))


def contents_hash(files: Sequence[Path]) -> str:
    """xxh128 (hex) over the names, without their folders, and the contents of files, in this order."""
    digest = xxhash.xxh128()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0")
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return str(digest.hexdigest())


def _read(path: Path) -> Iterator[Row]:
    suffix = bare_suffix(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".csv":
        return _csv(path)
    return _array(path) if suffix == ".json" and _first_byte(path) == b"[" else _lines(path)


def _first_byte(path: Path) -> bytes:
    with open_bytes(path) as file:
        while chunk := file.read(_CHUNK):
            start = chunk.removeprefix(b"\xef\xbb\xbf").lstrip()
            if start:
                return start[:1]
    return b""


def _object(value: Any, place: str, number: int) -> Row:
    if isinstance(value, dict):
        return Row(place, number, value, None)
    return Row(place, number, None, BadExample("not an object", f"found {type(value).__name__}, expected an object"))


def _lines(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                value = parse_json(line.decode("utf-8"))
            except UnicodeDecodeError as problem:
                detail = f"byte {problem.start} of the line (0x{line[problem.start]:02x})"
                yield Row(place, number, None, BadExample("invalid UTF-8", detail))
            except (ValueError, RecursionError) as problem:
                yield Row(place, number, None, BadExample("broken JSON", str(problem)))
            else:
                yield _object(value, place, number)


def _array(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        data = file.read()
    try:
        values = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {problem.start}); an array cannot be read past it"
        ) from None
    except (ValueError, RecursionError) as problem:
        raise UserError(
            f"{path}: broken JSON: {problem}. An array cannot be read past a mistake; .jsonl, an object a line, can"
        ) from None
    for number, value in enumerate(values):
        yield _object(value, f"{path}, row {number}", number)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit((1 << 31) - 1)  # 128 KiB otherwise: less than a long conversation

    def lines() -> Iterator[str]:
        with open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                yield line.decode("utf-8", "surrogateescape")  # one bad byte spoils a row, not the file

    reader = csv.reader(lines(), strict=True)
    names: list[str] | None = None
    number = 0
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            raise UserError(f"{path}, line {reader.line_num}: not CSV: {problem}") from problem
        if not values:
            continue
        if names is None:
            names = values
            if len(set(names)) != len(names):
                raise UserError(f"{path}: the header names a column twice: {', '.join(names)}")
            continue
        place = f"{path}, row {number} (line {reader.line_num})"
        data = dict(zip(names, values, strict=False))
        bad = next((name for name, value in data.items() if _ESCAPED.search(value)), None)
        if len(values) != len(names):
            detail = f"{len(values)} values, and the header has {len(names)} columns"
            yield Row(place, number, None, BadExample("wrong number of columns", detail))
        elif bad is not None:
            yield Row(place, number, None, BadExample("invalid UTF-8", f"column {bad!r}"))
        else:
            yield Row(place, number, data, None)
        number += 1


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            try:
                rows: list[Any] = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_one_by_one(batch, index) for index in range(batch.num_rows)]
            for data in rows:
                bad = isinstance(data, BadExample)
                yield Row(f"{path}, row {number}", number, None if bad else data, data if bad else None)
                number += 1
    except pyarrow.ArrowException as problem:
        raise UserError(f"{path} is not readable as parquet: {problem}") from problem


def _one_by_one(batch: Any, index: int) -> dict[str, Any] | BadExample:
    try:
        return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as problem:
        return BadExample("invalid UTF-8", str(problem))
