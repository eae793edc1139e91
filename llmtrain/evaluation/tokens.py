"""Shards as pieces of text: which of their rows are one stream of tokens, and any part of them."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.config import StreamConfig, TextDatasetConfig
from llmtrain.data.guarded_streaming import GuardedDataset
from llmtrain.data.shards import INDEX, prepared_with, require_index
from llmtrain.data.text import TextDataset
from llmtrain.errors import UserError


class Tokens(Protocol):
    """Text to evaluate on, as token ids."""

    pieces: list[int]
    """Tokens in each piece; a piece is one stream, across which a window may reach."""
    sources: list[str]
    """Name of the source that each piece is of."""

    names: list[str]
    """Where it lies, for messages and results."""
    joined: bool
    """Whether a window may be longer than a row of shards."""

    @property
    def row_length(self) -> int | None:
        """Tokens in a row of shards; None where there are no rows."""

    def read(self, piece: int, start: int, stop: int) -> NDArray[np.int64]:
        """Ids of a part of a piece, (stop - start,)."""

    def n_bytes(self, piece: int, start: int, stop: int) -> int | None:
        """Bytes of UTF-8 that the tokens of a part of a piece stand for; None where nobody knows."""


class ShardTokens:
    """The rows of shards, in the order in which they were written.

    Rows that `llmtrain prep` cut from a stream (documents joined end to end) go on in the next row: all rows of a
    folder are one piece. Where a row is of one document (`cut: documents`), or nobody says how rows were cut, each row
    is a piece of its own.

    Args:
        cfg: which shards; sampling, shuffling and `max_seq_len` mean nothing here.
        vocab_size: ids that the model has.
        fingerprints: of tokenizers whose ids the model knows; None compares nothing.
        key: names the shards in messages.
        bytes_of_ids: bytes that each id stands for, (vocab_size,); None where nobody knows.

    Raises:
        UserError: there are none, or they were made with another tokenizer.
    """

    def __init__(
        self,
        cfg: TextDatasetConfig,
        *,
        vocab_size: int,
        fingerprints: Sequence[str] | None,
        key: str,
        bytes_of_ids: NDArray[np.int64] | None = None,
    ) -> None:
        self.cfg = _whole(cfg)
        self.bytes_of_ids = bytes_of_ids
        _require(self.cfg, key)
        self._dataset = TextDataset(self.cfg, vocab_size=vocab_size, batch_size=1)
        self.row_length: int = self._length_of_a_row()
        self._dataset.max_seq_len = self.row_length
        self.pieces: list[int] = []
        self.sources: list[str] = []
        self.joined = True
        """Whether a window may be longer than a row."""
        self.names = [stream.describe() for stream in self._dataset.streams]
        """Where the shards lie, for messages and results."""
        self._first_rows: list[int] = []
        for stream, first, rows in zip(
            self._dataset.streams,
            self._dataset.sample_offset_per_stream.tolist(),
            self._dataset.samples_per_stream.tolist(),
            strict=True,
        ):
            made = prepared_with(Path(stream.local) / stream.split)
            if fingerprints is not None and not cfg.override_tokenizer_mismatch_error:
                _check_tokenizer(made, fingerprints, f"{key}: {stream.describe()}")
            if made is not None and "tokenizer_fingerprint" in made and made.get("cut", "stream") == "stream":
                self.pieces.append(rows * self.row_length)
                self._first_rows.append(first)
            else:
                self.joined = False
                self.pieces += [self.row_length] * rows
                self._first_rows += range(first, first + rows)
            self.sources += [stream.name or stream.describe()] * (len(self.pieces) - len(self.sources))

    def read(self, piece: int, start: int, stop: int) -> NDArray[np.int64]:
        """See Tokens."""
        first = start // self.row_length
        rows = range(first, -(-stop // self.row_length))
        ids = [self._dataset.get_item(self._first_rows[piece] + row)["tokens"] for row in rows]
        offset = first * self.row_length
        return np.concatenate(ids).astype(np.int64)[start - offset : stop - offset]

    def n_bytes(self, piece: int, start: int, stop: int) -> int | None:
        """See Tokens. As the ids decode: of the text as the tokenizer has normalized it."""
        if self.bytes_of_ids is None:
            return None
        step = 4096 * self.row_length  # shards may be larger than the memory
        parts = (self.read(piece, first, min(first + step, stop)) for first in range(start, stop, step))
        return int(sum(self.bytes_of_ids[ids].sum() for ids in parts))

    def _length_of_a_row(self) -> int:
        sample: dict[str, Any] = GuardedDataset.get_item(self._dataset, 0)
        tokens = sample["tokens"]
        return (
            len(tokens) // np.dtype(self.cfg.token_encoding_type).itemsize if isinstance(tokens, bytes) else len(tokens)
        )


class JoinedTokens:
    """Several kinds of text, one after another."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = parts
        self.names = [name for part in parts for name in part.names]
        self.joined = all(part.joined for part in parts)
        self.row_length = max((part.row_length for part in parts if part.row_length is not None), default=None)
        self.pieces = [size for part in parts for size in part.pieces]
        self.sources = [source for part in parts for source in part.sources]
        self._where = [(part, number) for part in parts for number in range(len(part.pieces))]

    def read(self, piece: int, start: int, stop: int) -> NDArray[np.int64]:
        """See Tokens."""
        part, number = self._where[piece]
        return part.read(number, start, stop)

    def n_bytes(self, piece: int, start: int, stop: int) -> int | None:
        """See Tokens."""
        part, number = self._where[piece]
        return part.n_bytes(number, start, stop)


def folder_of_shards(path: Path) -> TextDatasetConfig:
    """The config of a folder that a user names: one with shards, or what `llmtrain prep` made, of which `val`."""
    if not (path / INDEX).is_file() and (path / "val" / INDEX).is_file():
        path = path / "val"
    return TextDatasetConfig(local=str(path), max_seq_len=1)


def _whole(cfg: TextDatasetConfig) -> TextDatasetConfig:
    """Every row of every stream once, in order; the length is found out afterwards."""
    everything = {"proportion": None, "repeat": None, "choose": None}
    streams = None
    if cfg.streams is not None:
        streams = {name: stream.model_copy(update=everything) for name, stream in cfg.streams.items()}
    update = {"max_seq_len": 1, "shuffle": False, "epoch_size": None, "streams": streams, "num_canonical_nodes": 1}
    return cfg.model_copy(update={**update, "replication": None, "return_sample_ids": False, "predownload": None})


def _require(cfg: TextDatasetConfig, key: str) -> None:
    streams = cfg.streams or {"": StreamConfig(local=cfg.local, remote=cfg.remote)}
    for stream, place in itertools.product(streams.values(), ("remote", "local")):
        folder = getattr(stream, place)
        if folder is not None and "://" not in folder and (place == "remote" or stream.remote is None):
            split = stream.split if stream.split is not None else cfg.split or ""
            require_index(Path(folder) / split, key)


def _check_tokenizer(made: dict[str, Any] | None, fingerprints: Sequence[str], where: str) -> None:
    theirs = None if made is None else made.get("tokenizer_fingerprint")
    if theirs is not None and theirs not in fingerprints:
        raise UserError(
            f"{where} was made with another tokenizer (fingerprint {theirs[:12]}) than the model's "
            f"({fingerprints[0][:12]}): its losses would mean nothing. Prepare the data with the model's tokenizer"
        )
