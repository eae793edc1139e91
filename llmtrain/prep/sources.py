"""Sources of documents: files of several kinds, and datasets of the Hugging Face hub."""

import ast
import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.compressed import bare_suffix, open_bytes
from llmtrain.errors import UserError
from llmtrain.prep.config import SourceConfig, SourcePlace


class Document(NamedTuple):
    """One document."""

    text: str
    n_bytes: int
    """Length of the text in UTF-8."""


def documents(source: SourceConfig) -> Iterator[Document]:
    """The documents of a source, in an order that is always the same; stops at its `max_documents` and `max_bytes`.

    Raises:
        UserError: no file matches, or a file or row is malformed (named with file and line or row).
    """
    n_bytes = 0
    for number, (text, where) in enumerate(_all_documents(source)):
        if number == source.max_documents:
            return
        try:
            length = len(text.encode())
        except UnicodeEncodeError as problem:  # JSON can spell what UTF-8 cannot
            raise UserError(f"{where}: holds half a surrogate pair (character {problem.start})") from problem
        n_bytes += length
        if source.max_bytes is not None and n_bytes > source.max_bytes:
            return
        yield Document(text, length)


def files_of(source: SourcePlace) -> list[Path]:
    """The files of a source, in the order in which they are read; empty for a Hugging Face dataset.

    Raises:
        UserError: a pattern matches no file.
    """
    return list(named_files_of(source))


def named_files_of(source: SourcePlace) -> dict[Path, str]:
    """The files of a source, each with its path from the first folder of its pattern that a wildcard stands in.

    Raises:
        UserError: a pattern matches no file.
    """
    found: dict[Path, str] = {}  # path -> what its place in a shuffled order goes by
    for pattern in source.files or []:
        expanded = _expand(pattern)
        # The part before the first wildcard differs between machines; the shuffled order must not.
        root = expanded.split("*")[0].rpartition("/")[0] + "/"
        names = glob.glob(expanded, recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
        matches = [Path(name) for name in names if Path(name).is_file()]
        if not matches:
            raise UserError(f"source {source.name!r}: no file matches {expanded!r} (from {Path.cwd()})")
        found.update((path, str(path).removeprefix(root)) for path in matches)
    exclude = [_expand(pattern) for pattern in source.exclude]
    kept = [path for path in found if not any(fnmatch(str(path), pattern) for pattern in exclude)]
    if source.files and not kept:
        raise UserError(f"source {source.name!r}: exclude leaves none of the {len(found)} files")
    if source.order == "shuffled":
        kept.sort(key=lambda path: hashlib.sha256(found[path].encode()).digest())
    else:
        kept.sort()
    return {path: found[path] for path in kept}


def describe_inputs(source: SourcePlace) -> dict[str, Any]:
    """What a later run compares to see whether the inputs are still the same: names and sizes of the files."""
    if source.hf_name is not None:
        return {"hf_name": source.hf_name, "split": source.split}
    files = files_of(source)
    sizes = [(path.name, path.stat().st_size) for path in files]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return {"files": len(files), "bytes": sum(size for _, size in sizes), "names_and_sizes": digest}


def _all_documents(source: SourceConfig) -> Iterator[tuple[str, str]]:
    if source.hf_name is not None:
        yield from _hugging_face(source)
        return
    if source.join is not None:
        yield from _joined(source)
        return
    for path in files_of(source):
        yield from _read(path, source)


def _joined(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """One document for each file or folder; texts are a blank line apart."""
    groups: dict[str, list[tuple[Path, str]]] = {}
    for path, name in named_files_of(source).items():
        first, _, deeper = name.partition("/")
        group = str(path).removesuffix(name) + first if source.join == "folder" and deeper else str(path)
        groups.setdefault(group, []).append((path, name))
    for group, files in groups.items():
        parts = []
        for path, name in sorted(files):
            text = "\n\n".join(row for row, _ in _read(path, source))
            header = "" if source.header is None else source.header.replace("{path}", name) + "\n"
            parts.append(header + text)
        yield "\n\n".join(parts), group


def _expand(pattern: str) -> str:
    return str(Path(pattern.replace("{stdlib}", sysconfig.get_path("stdlib"))).expanduser())


def _read(path: Path, source: SourceConfig) -> Iterator[tuple[str, str]]:
    try:
        yield from _rows(path, source)
    except (OSError, EOFError) as problem:
        raise UserError(f"source {source.name!r}: {path} cannot be read: {problem}") from problem


def _rows(path: Path, source: SourceConfig) -> Iterator[tuple[str, str]]:
    suffix = bare_suffix(path)
    kind = source.format
    if kind == "auto":
        kind = "jsonl" if suffix in {".jsonl", ".json"} else "parquet" if suffix == ".parquet" else "text"
    if kind == "parquet":
        return _parquet(path, source.text_column)
    if kind == "jsonl":
        return _jsonl(path, source.text_column)
    return _python_literals(path) if kind == "python_literals" else iter([(_text(path), str(path))])


def _text(path: Path) -> str:
    with open_bytes(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {problem.start}); convert it, or exclude it"
        ) from problem


def _jsonl(path: Path, column: str) -> Iterator[tuple[str, str]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as problem:  # bad JSON, or not UTF-8
                raise UserError(f"{where}: not JSON: {problem}") from problem
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object with the key {column!r}, found {type(row).__name__}")
            yield _text_of(row, column, where), where


def _parquet(path: Path, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(names)} (set text_column)")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                where = f"{path}, row {number}"
                yield _text_of({column: value}, column, where), where
                number += 1
    except pyarrow.ArrowException as problem:
        raise UserError(f"{path} is not readable as parquet: {problem}") from problem


def _python_literals(path: Path) -> Iterator[tuple[str, str]]:
    """`name = {key: "text", ...}`: how Python keeps its language reference (`pydoc_data/topics.py`)."""
    try:
        module = ast.parse(_text(path))
        values = [ast.literal_eval(node.value) for node in module.body if isinstance(node, ast.Assign)]
    except (SyntaxError, ValueError) as problem:
        raise UserError(f"{path}: expected assignments of literals only: {problem}") from problem
    texts = [text for value in values if isinstance(value, dict) for text in value.values() if isinstance(text, str)]
    if not texts:
        raise UserError(f"{path}: assigns no dict of strings (format: python_literals)")
    return ((text, str(path)) for text in texts)


def _hugging_face(source: SourceConfig) -> Iterator[tuple[str, str]]:
    import datasets  # only here: it is slow to import

    try:
        rows = datasets.load_dataset(source.hf_name, split=source.split, streaming=True, **source.hf_kwargs)
        iterator = iter(rows)
    except Exception as problem:  # it raises whatever its back-ends raise
        reason = f"{type(problem).__name__}: {problem}"
        raise UserError(
            f"source {source.name!r}: the dataset {source.hf_name!r} cannot be opened: {reason}"
        ) from problem
    number = 0
    while True:
        where = f"source {source.name!r} ({source.hf_name}, split {source.split}), row {number}"
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as problem:
            raise UserError(f"{where}: {type(problem).__name__}: {problem}") from problem
        yield _text_of(row, source.text_column, where), where
        number += 1


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise UserError(f"{where}: no {column!r}; it has {', '.join(map(str, row)) or 'nothing'} (set text_column)")
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{where}: {column!r} should be text, found {type(text).__name__}")
    return text
