"""Plain text to evaluate on: documents of files, tokenized by the model's own tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmtrain.compressed import bare_suffix
from llmtrain.errors import UserError
from llmtrain.evaluation.token_bytes import bytes_of_tokens
from llmtrain.prep.config import SourceConfig
from llmtrain.prep.documents import Document
from llmtrain.prep.fragments import Parts
from llmtrain.prep.inputs import input_bytes, pieces_of
from llmtrain.prep.readers import BadInput, read_piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = frozenset((".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson", ".json", ".parquet"))
"""What is taken of a folder, also compressed (`.gz`, `.zst`)."""
_PIECE = 1 << 25  # bytes


class TextTokens:
    """Documents; each is a piece, with the token before it that the model has before a document.

    That is BOS where the tokenizer begins texts with it, and otherwise EOS, with which training ends the document
    before. So every token of the text is predicted, and what they stand for is the whole text.

    Args:
        files: files, folders and patterns.
        tokenizer: the model's.
        column: field of `.jsonl` and `.parquet` with the text.
        vocab_size: ids that the model has.
        name: of the source, in results.
        max_tokens: stop reading after so many.
        advance: is told how many bytes were read.

    Raises:
        UserError: no file, no text, a row without text, or a tokenizer that is not this model's.
    """

    joined = True

    def __init__(
        self,
        files: Sequence[str],
        tokenizer: "PreTrainedTokenizerFast",
        *,
        column: str = "text",
        vocab_size: int,
        name: str,
        max_tokens: int | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.first = _before_a_document(tokenizer)
        self.pieces: list[int] = []
        self.names = list(files)
        self.row_length: int | None = None
        self.n_documents = 0
        self._starts: list[int] = []
        ids: list[NDArray[np.uint32]] = []
        sizes: list[NDArray[np.uint32]] = []
        total = 0
        for some, lengths in _tokenized(_documents(_source(files, column), advance), tokenizer):
            self._starts.append(total)
            self.pieces.append(len(some) + 1)
            total += len(some)
            ids.append(some)
            sizes.append(lengths)
            if max_tokens is not None and total + len(self.pieces) >= max_tokens:
                break
        if not total:
            raise UserError(f"{', '.join(files)}: no text in it: there is nothing to predict")
        self._ids = np.concatenate(ids)
        self._bytes = np.concatenate(sizes)
        if int(self._ids.max()) >= vocab_size:
            raise UserError(
                f"{', '.join(files)}: the tokenizer gives ids up to {int(self._ids.max()):,}, and the model has "
                f"{vocab_size:,} embeddings: they do not belong together"
            )
        self.n_documents = len(self.pieces)
        self.sources = [name] * len(self.pieces)

    def read(self, piece: int, start: int, stop: int) -> NDArray[np.int64]:
        """See Tokens."""
        begin = self._starts[piece]
        body = self._ids[begin + max(start - 1, 0) : begin + stop - 1].astype(np.int64)
        return np.concatenate([[self.first], body]) if start == 0 else body

    def n_bytes(self, piece: int, start: int, stop: int) -> int:
        """See Tokens."""
        begin = self._starts[piece]
        return int(self._bytes[begin + max(start - 1, 0) : begin + stop - 1].sum(dtype=np.int64))


def expanded(path: Path) -> list[str]:
    """A file, or the text files below a folder.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        return [str(path)]
    found = sorted(
        str(file)
        for file in path.rglob("*")
        if file.is_file() and bare_suffix(file) in TEXT and not file.name.startswith(".")
    )
    if not found:
        raise UserError(f"{path}: holds neither shards (index.json) nor text ({', '.join(sorted(TEXT))})")
    return found


def is_text(path: Path) -> bool:
    """Whether a path that a user gives as data is text and not shards."""
    if path.is_dir():
        return not any((place / "index.json").is_file() for place in (path, path / "val"))
    return path.is_file() or bare_suffix(path) in TEXT or any(sign in str(path) for sign in "*?[")


class _Named(BadInput):
    """What cannot be read is an error."""

    def __init__(self) -> None:
        super().__init__("fail")

    def __call__(self, place: str, reason: str) -> None:
        raise UserError(f"{place}: {reason}")


def _source(files: Sequence[str], column: str) -> SourceConfig:
    names = [name for file in files for name in expanded(Path(file))]
    for name in names:
        if not any(sign in name for sign in "*?[") and "://" not in name and not Path(name).is_file():
            raise UserError(f"{name}: no such file (from {Path.cwd()})")
    return SourceConfig(name="text", files=names, text_column=column)


def _documents(source: SourceConfig, advance: Callable[[int], None]) -> Iterator[Document]:
    for piece in pieces_of(source, _PIECE):
        for document in read_piece(source, piece, _Named()):
            yield document
            advance(document.n_bytes)


def n_input_bytes(files: Sequence[str], column: str) -> int:
    """Size of the files, compressed or not, for progress.

    Raises:
        UserError: there is no such file.
    """
    return input_bytes([_source(files, column)])


def _before_a_document(tokenizer: "PreTrainedTokenizerFast") -> int:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    found = bos if bos is not None and begins == [bos] else eos
    return int(found if found is not None else bos or 0)


def _tokenized(
    documents: Iterator[Document], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint32]]]:
    """Ids of each document that has any, and the bytes that each of them stands for."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # whatever calls have set there
    raw.no_truncation()
    raw.no_padding()
    parts = Parts(lambda text: np.array(raw.encode(text, add_special_tokens=False).ids, np.uint32))
    ids: list[NDArray[np.uint32]] = []
    sizes: list[NDArray[np.uint32]] = []
    for document in documents:
        text = document.text
        if document.part in ("whole", "first"):
            ids, sizes = [], []
            parts.start()
        if document.part != "whole":
            text = parts.add(text, last=document.part == "last")
        encoding = raw.encode(text, add_special_tokens=False)
        if encoding.ids:
            ids.append(np.array(encoding.ids, np.uint32))
            ends = np.array([end for _, end in encoding.offsets], np.int64)
            sizes.append(bytes_of_tokens(text, ends).astype(np.uint32))
        if document.part in ("whole", "last") and ids:
            yield np.concatenate(ids), np.concatenate(sizes)
