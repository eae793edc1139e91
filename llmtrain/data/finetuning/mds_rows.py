"""Rows of MDS shards, one after the other, as they are read once and then kept tokenized.

Streaming's stream downloads, checks and decompresses; its dataset (shared memory, threads, an order of its own) is not
needed for that.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from streaming.base.world import World

from llmtrain.conversations.messages import BadExample
from llmtrain.conversations.rows import Row
from llmtrain.data.finetuning.config import FinetuningStreamConfig
from llmtrain.data.guarded_streaming import GuardedStream, ShardError
from llmtrain.data.shards import INDEX, require_index
from llmtrain.file_lock import one_at_a_time
from llmtrain.json_text import parse_json
from llmtrain.redaction import without_password

log = logging.getLogger(__name__)

_ALONE = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)


class ExampleStream(GuardedStream):
    """A stream of rows of any shape: they are looked at one by one."""

    def check_rows(self, shard: Any, where: str) -> None:
        """Columns are the business of who makes examples of the rows."""


class MDSRows:
    """The rows of a folder of MDS shards.

    Args:
        source: with `local`, `remote` or both.
        key: prefix of its keys in messages.
        cache: where shards of a `remote` without `local` are downloaded to.
        allow_unsafe_types: accept pickled columns.

    Raises:
        UserError: there are no shards, or their index cannot be had or read.
    """

    def __init__(self, source: FinetuningStreamConfig, key: str, cache: Path, allow_unsafe_types: bool) -> None:
        remote, local, split = source.remote, source.local, source.split or ""
        if remote is not None and "://" not in remote:
            require_index(Path(remote) / split, f"{key}remote")
            local = local or remote  # a folder of this machine needs no copy
        elif remote is None:
            require_index(Path(local or "") / split, f"{key}local")
        elif local is None:
            local = str(cache / xxhash.xxh128_hexdigest(f"{remote}\0{split}"))
        self.stream = ExampleStream(
            remote=remote,
            local=local,
            split=split,
            download_retry=source.download_retry or 6,
            download_timeout=source.download_timeout or 60,
            validate_hash=source.validate_hash,
            keep_zip=source.keep_zip or False,
        )
        self.shards = self.stream.get_shards(_ALONE, allow_unsafe_types)
        self.sizes = [len(shard) for shard in self.shards]
        self._ends = np.cumsum(self.sizes)
        self._ready: set[int] = set()

    def identity(self) -> str:
        """Hex: over the index, which has sizes and mostly hashes; over the shards themselves where it has no hashes."""
        index = parse_json((self._folder / INDEX).read_text(encoding="utf-8"))
        digest = xxhash.xxh128(json.dumps(index["shards"], sort_keys=True))
        for shard in self.shards:
            files = [info for pair in shard.file_pairs for info in pair if info is not None]
            if not all(info.hashes for info in files) and not self.stream.has_other_copy():
                for info in files:
                    path = self._folder / info.basename
                    if path.is_file():
                        with path.open("rb") as file:
                            while chunk := file.read(1 << 20):
                                digest.update(chunk)
        return str(digest.hexdigest())

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))

    def row(self, number: int) -> Row:
        """A row by its number among those of all shards; its shard is fetched if it is not there.

        Raises:
            ShardError: the shard cannot be had or read.
        """
        index = int(np.searchsorted(self._ends, number, side="right"))
        shard, row = self.shards[index], number - (int(self._ends[index - 1]) if index else 0)
        name = (shard.file_pairs[0][1] or shard.file_pairs[0][0]).basename
        place = f"{self._folder / name}, row {row}"
        if index not in self._ready:
            if not self._is_there(shard):
                # Ranks and their workers share the folder.
                with one_at_a_time(self._folder / f".{name}.lock", nap=0.05):
                    self._prepare(shard, name)
            self._ready.add(index)
        try:
            data = shard.get_sample_data(row)
        except Exception as problem:  # whatever a damaged header makes of numpy
            raise ShardError(f"{place} cannot be read: {problem}. Prepare or copy the data again") from problem
        try:
            return Row(place, number, shard.decode_sample(data), None)
        except UnicodeDecodeError as problem:
            return Row(place, number, None, BadExample("invalid UTF-8", str(problem)))
        except Exception as problem:  # each encoding raises its own
            return Row(place, number, None, BadExample("malformed row", f"{type(problem).__name__}: {problem}"))

    @property
    def _folder(self) -> Path:
        return Path(str(self.stream.local), self.stream.split or "")

    def _is_there(self, shard: Any) -> bool:
        files = [(self._folder / raw.basename, raw.bytes) for raw, _ in shard.file_pairs]
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def _prepare(self, shard: Any, name: str) -> None:
        """Download and decompress a shard; a damaged cached copy is fetched once more."""
        for last in (False, True):
            try:
                self.stream.prepare_shard(shard)
                for raw, _ in shard.file_pairs:
                    size = (self._folder / raw.basename).stat().st_size
                    if size != raw.bytes:
                        raise ValueError(f"it has {size:,} bytes, and the index says {raw.bytes:,}")
                return
            except Exception as problem:  # each kind of storage raises its own
                where = f"{self.stream.describe()}: shard {name}"
                reason = without_password(str(problem).strip() or repr(problem))
                mine = self.stream.has_other_copy()
                if mine:
                    for info in (info for pair in shard.file_pairs for info in pair if info is not None):
                        (self._folder / info.basename).unlink(missing_ok=True)
                if last or not mine:
                    cure = "Check it at its source" if mine else "Prepare or copy the data again"
                    raise ShardError(f"{where} cannot be read: {reason}. {cure}") from problem
                log.warning("%s: %s. Its cached copy is deleted and fetched again.", where, reason)
