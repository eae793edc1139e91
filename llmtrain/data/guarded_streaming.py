"""Streaming's dataset, loader and stream, without their silent failures.

As it is (0.13), a shard that cannot be downloaded or whose hash is wrong ends the epoch early without an exception, or
stops the process for ever: the failing thread leaves the shard marked as "being prepared", and everyone else waits for
it. The bad file stays in the cache, where the next run takes it for good. Here such a shard is an exception that
names it, and its cached copy is deleted.
"""

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.format.base.reader import FileInfo
from streaming.base.hashing import get_hash
from streaming.base.storage.download import CloudDownloader
from streaming.base.world import World

from llmtrain.data.mds_files import unpack
from llmtrain.data.shards import INDEX, check_columns, check_names, check_size
from llmtrain.data.shared_cache import CacheUse, in_turn
from llmtrain.data.shared_names import closed_afterwards, gather, memories, own_names
from llmtrain.data.worker_signals import OutlivesSigterm
from llmtrain.errors import UserError
from llmtrain.redaction import without_password
from llmtrain.trust import require

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds, between attempts at a download


class ShardError(UserError):
    """A shard cannot be had or read; names it."""


class GuardedStream(Stream):  # type: ignore[misc]
    """A stream that looks at its index before it trusts it."""

    name = ""
    max_seq_len = 1
    validate_hash: str | None
    _downloader: CloudDownloader
    _connected_by: int | None = None
    _of_parent: CloudDownloader | None = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._sizes: dict[str, int] = {}

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:
        """Fetch and check the index.

        Raises:
            UserError: It cannot be fetched or read, or the shards are not rows of tokens, or nobody said that their
                pickles may run.
        """
        where = self.describe()
        if allow_unsafe_types:
            require("allow_unsafe_types", where, what="what the pickles in these shards name")
        index = Path(self.local) / self.split / INDEX
        try:
            with self._in_turn(INDEX) if world.is_local_leader else nullcontext():
                shards: list[Any] = super().get_shards(world, allow_unsafe_types)
        except Exception as problem:  # each kind of storage raises its own
            if (
                isinstance(problem, (ValueError, KeyError, TypeError))
                and self.has_other_copy()
                and world.is_local_leader
            ):
                index.unlink(missing_ok=True)  # or the next run would find the same damaged copy
            reason = without_password(f"{type(problem).__name__}: {problem}")
            raise UserError(f"{where}: its {INDEX} cannot be fetched or read: {reason}") from problem
        files = [info for shard in shards for pair in shard.file_pairs for info in pair if info is not None]
        check_names([info.basename for info in files], where)
        for shard in shards:
            raw_files = [raw for raw, _ in shard.file_pairs]
            for raw in raw_files:  # where the rows begin stands in an MDS shard itself, and in the other formats' last
                check_size(raw.basename, shard.samples if raw is raw_files[-1] else 0, raw.bytes, where)
                self._sizes[raw.basename] = raw.bytes
        for shard in shards[:1]:  # prep writes all shards of a folder alike; rows are checked again when they are read
            self.check_rows(shard, where)
        known = set.intersection(*(set(info.hashes) for info in files)) if files else set()
        if self.validate_hash is None:
            self.validate_hash = min(known, default=None)
        elif self.validate_hash not in known:
            has = ", ".join(sorted(known)) or "none"
            raise UserError(f"{where}: validate_hash is {self.validate_hash!r}, but the shards have: {has}")
        return shards

    def prepare_shard(self, shard: Any) -> int:
        """Download and decompress a shard, if no other run has; the change in bytes of the cache."""
        with self._in_turn(shard.file_pairs[0][0].basename):
            try:
                change: int = super().prepare_shard(shard)
            except FileNotFoundError:  # another run, as it started, deleted a compressed file that it had no use for
                change = super().prepare_shard(shard)
        return change

    def _decompress_shard_part(
        self, zip_info: Any, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        """Decompress a shard, and no more of it than the index says.

        In place of Streaming's own, which makes whatever the file unfolds to: a few KB may be terabytes.
        """
        data = Path(zip_filename).read_bytes()
        if self.validate_hash and get_hash(self.validate_hash, data) != zip_info.hashes[self.validate_hash]:
            raise ValueError(f"Checksum failure: {zip_filename}")
        size = self._sizes[Path(raw_filename).relative_to(Path(self.local) / self.split).as_posix()]
        raw = unpack(data, compression or "", size)
        if len(raw) != size:
            raise ValueError(f"{zip_filename} does not unfold to the {size:,} bytes that the index says")
        temporary = Path(f"{raw_filename}.tmp")
        temporary.write_bytes(raw)
        temporary.replace(raw_filename)
        if not self.safe_keep_zip:
            Path(zip_filename).unlink()

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Streaming's, which takes a file that lies here already for whole and sound."""
        path = Path(self.local) / self.split / raw_info.basename
        was_here = path.is_file()
        change: int = super()._prepare_shard_part(raw_info, zip_info, compression)
        name = self.validate_hash if was_here else None
        if name in raw_info.hashes and get_hash(name, path.read_bytes()) != raw_info.hashes[name]:
            raise ValueError(f"Checksum failure: {path}")
        return change

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Fetch a file to the cache, in up to `download_retry` attempts; its path there.

        In place of Streaming's own, which takes whatever lies there for the whole file, also what a broken download or
        a killed process left, and which tries again where it is pointless.
        """
        local = Path(self.local) / self.split / (to_basename or from_basename)
        if to_basename is not None:  # of the index; whoever asks has seen that it is not there
            local.unlink(missing_ok=True)
        if local.exists():
            return str(local)
        remote = None if self.remote is None else os.path.join(self.remote, self.split, from_basename)  # noqa: PTH118
        part = local.with_name(f"{local.name}.part")
        self._leave_connections_to_parent()
        for attempt in range(1, self.download_retry + 1):
            part.unlink(missing_ok=True)
            try:
                self._downloader.download(remote, str(part), self.download_timeout)
                part.replace(local)
                return str(local)
            except Exception as problem:  # each kind of storage raises its own
                self._downloader.clean_up()  # the next attempt connects anew
                part.unlink(missing_ok=True)
                if attempt == self.download_retry or _is_pointless_to_repeat(problem):
                    raise
                reason = without_password(str(problem).strip() or repr(problem))
                place = f"{self.describe()}: {from_basename}"
                log.warning("%s: %s; attempt %d of %d", place, reason, attempt + 1, self.download_retry)
                sleep(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.75, 1))
        raise AssertionError("unreachable")

    def _leave_connections_to_parent(self) -> None:
        """Connect anew in a worker that was forked after the index was fetched.

        Two processes on one connection read each other's answers; SSH's waits for ever for a thread that is not there.
        """
        if self._connected_by != os.getpid():
            if self._connected_by is not None:
                self._of_parent = self._downloader  # kept: if it went, it would say goodbye in the parent's name
                self._downloader = CloudDownloader.get(self.remote)
            self._connected_by = os.getpid()

    def _in_turn(self, file: str) -> AbstractContextManager[None]:
        if not self.has_other_copy():
            return nullcontext()
        return in_turn(Path(self.local) / self.split, file, self.download_retry * self.download_timeout + 60)

    def check_rows(self, shard: Any, where: str) -> None:
        """Check what the index says about a shard's rows.

        Raises:
            UserError: They are no rows of tokens.
        """
        names, encodings = getattr(shard, "column_names", ()), getattr(shard, "column_encodings", ())  # JSON's has none
        check_columns(names, encodings, self.max_seq_len, where)

    def has_other_copy(self) -> bool:
        """Whether the local files are a cache of something else: only then may a bad one be deleted."""
        if self.remote is None:
            return False
        return "://" in self.remote or Path(self.remote).resolve() != Path(self.local).resolve()

    def describe(self) -> str:
        """For messages: the stream's name and place."""
        place = without_password(str(Path(self.local if self.remote is None else self.remote)))
        if self.remote is not None and "://" in self.remote:
            place = without_password(self.remote)  # Path would swallow a slash
        split = f"/{self.split}" if self.split else ""
        return f"stream {self.name!r} ({place}{split})" if self.name else f"{place}{split}"


def _is_pointless_to_repeat(problem: Exception) -> bool:
    """Whether a storage said that there is no such file, or that it is none of our business."""
    if isinstance(problem, (FileNotFoundError, PermissionError, ValueError)):
        return True
    response = getattr(problem, "response", None)  # boto3's is a dict, the others' an object or nothing
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    status = metadata.get("HTTPStatusCode") or getattr(problem, "status_code", None) or getattr(problem, "code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in {408, 429}


class GuardedDataset(StreamingDataset):  # type: ignore[misc]
    """A StreamingDataset that raises when it cannot give all the samples it promised.

    Raises, while it is iterated:
        ShardError: A shard is missing or damaged, or the epoch ended before its last sample.
    """

    counted_once = False
    """Whether the trainer counts samples that several ranks get (`replication`) once."""
    _problem: Exception | None = None
    _promised = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with own_names() as names:
            super().__init__(*args, **kwargs)
        self._shared_barrier.filelock_path = names.path(BARRIER_FILELOCK)
        self._cache_filelock_path = names.path(CACHE_FILELOCK)
        self._names = names
        self._prepared: set[int] = set()
        names.give_back_with(self)
        self._use_caches()
        self._distrust()

    def __iter__(self) -> Iterator[Any]:
        """This worker's samples of the next epoch, all of them or an exception."""
        self._problem = None
        seen = promised = 0
        for sample in super().__iter__():
            promised = promised or self._promised
            seen += 1
            yield sample
        if self._problem is not None:
            raise self._problem
        if seen != (promised or self._promised):
            raise ShardError(
                f"the epoch ended after {seen:,} of {promised or self._promised:,} samples of this worker: "
                "a reader stopped, or a second iteration over the same dataset was started"
            )

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """One sample, by its number in the whole dataset.

        Raises:
            ShardError: Its shard is missing or damaged.
        """
        try:
            return super().get_item(sample_id, retry)
        except Exception as problem:  # whatever a damaged shard makes of numpy, json or the storage
            if hasattr(self, "_event"):
                self._event.set()  # the threads need not go on
            if isinstance(problem, UserError):
                raise
            if self._problem is not None:
                raise self._problem from problem
            shard_id, row = self.spanner[sample_id]
            raise self._failed(shard_id, problem, f", row {row},") from problem

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download and decompress a shard; a damaged cached copy is fetched once more.

        Raises:
            ShardError: It cannot be had.
        """
        if CACHE_FILELOCK not in self.__dict__:
            # Streaming looks for the lock under another name than it keeps it by, and so makes a new one in each call;
            # a call that fails could then not give its own lock back. Made here, after the worker was forked.
            self._cache_filelock = FileLock(self._cache_filelock_path)
            setattr(self, CACHE_FILELOCK, self._cache_filelock)
        if not blocking and shard_id in self._prepared:
            return  # Streaming takes and gives back a file lock for each sample
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as first:
            if not self._forget(shard_id):
                raise self._failed(shard_id, first) from first
            log.warning("%s: %s. Its cached copy is deleted and fetched again.", self._name(shard_id), first)
            try:
                super().prepare_shard(shard_id, blocking)
            except Exception as second:
                raise self._failed(shard_id, second) from second
        if not self.cache_limit and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._prepared.add(shard_id)  # nobody deletes it; a reader that misses it nevertheless comes here blocking

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where a checkpoint stands.

        Between two epochs Streaming's own state is "no sample of the epoch that is over", so that a resume would read
        that epoch's order a second time; here it is "no sample of the next one". And Composer, who counts from the
        beginning, counts the samples of all ranks, also where several get the same ones (see `counted_once`).
        """
        if from_beginning and not self.counted_once:
            num_samples //= self.replication or 1
        state: dict[str, Any] = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"], _ = self._resume(self._parallel_rank_world, self.next_epoch)
        return state

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on where a checkpoint stood. The seed and the canonical nodes are the checkpoint's from now on."""
        for key in ("shuffle_seed", "num_canonical_nodes"):
            ours, theirs = getattr(self, key), obj.get(key)
            if theirs is not None and theirs != ours:
                log.warning("%s: the recipe says %s, the checkpoint %s; the checkpoint's holds.", key, ours, theirs)
        with memories() as made:
            super().load_state_dict(obj)
        self._names.keep(*made)

    def _use_caches(self) -> None:
        """Raises UserError on all ranks when another run reads one of the caches and one of both has a cache_limit."""
        use, problem = CacheUse(), None
        if self._unique_rank_world.is_local_leader:
            caches = [Path(s.local) / s.split for s in self.streams if s.has_other_copy()]
            problem = use.begin(caches, alone=bool(self.cache_limit))
            use.end_with(self)
        problems = [found for found in gather(problem) if found is not None]
        if problems:
            use.end(os.getpid())
            raise UserError(problems[0])

    def _distrust(self) -> None:
        """Have each shard that lies here already be prepared, too, when it is first needed: its hash is checked then.

        Once on each node and in each run. Not with a cache_limit: only shards that were prepared can be evicted.
        """
        if self.cache_limit or not self._unique_rank_world.is_local_leader:
            return
        for shard_id in range(self.num_shards):
            if self._stream(shard_id).validate_hash and self._shard_states[shard_id] == _ShardState.LOCAL:
                self._shard_states[shard_id] = _ShardState.REMOTE

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        with closed_afterwards():
            where: tuple[int, int] = super()._resume(world, epoch)
        return where

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        work: NDArray[np.int64] = super()._get_work(epoch, sample_in_epoch)
        self._promised = int((work != -1).sum())  # -1 pads the ranks to the same length
        return work

    def _prepare_thread(self, it: _Iterator) -> None:
        self._report(super()._prepare_thread, it)

    def _ready_thread(self, it: _Iterator) -> None:
        self._report(self._make_ready, it)

    def _report(self, body: Callable[[_Iterator], None], it: _Iterator) -> None:
        """Run a background thread; what it raises is kept for the thread that yields the samples."""
        try:
            body(it)
        except Exception as problem:
            self._problem = self._problem or problem
            self._event.set()
            it.on_exit()  # or the end of the iteration would wait for this thread for ever

    def _make_ready(self, it: _Iterator) -> None:
        """Follow the downloads in the order of the samples.

        In place of Streaming's own loop, which waits for ever for a shard that another process failed to download.
        """
        while not (it.should_exit() or self._event.is_set() or it.ready_index == it.total):
            if self.predownload is not None and it.ready_index - it.yield_index > self.predownload:
                sleep(TICK)
                continue
            sample_id = it.sample_ids[it.ready_index]
            if sample_id != -1:
                self._await_shard(self.spanner[sample_id][0], it)
            it.ready_index += 1
        it.on_exit()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        """The samples in their order, each when its shard is there.

        In place of Streaming's own loop, which also waits, 7 ms at a time, until a thread has said so of each sample.
        """
        while not (it.should_exit() or it.yield_index == it.total or self._event.is_set()):
            sample_id = it.sample_ids[it.yield_index]
            if sample_id != -1:
                if it.ready_index <= it.yield_index and self.spanner[sample_id][0] not in self._prepared:
                    sleep(TICK)
                    continue
                yield sample_id
            it.yield_index += 1
        it.on_exit()

    def _await_shard(self, shard_id: int, it: _Iterator) -> None:
        while not (it.should_exit() or self._event.is_set()):
            state = self._shard_states[shard_id]
            if state == _ShardState.LOCAL:
                return
            if state == _ShardState.REMOTE:
                self.prepare_shard(shard_id, False)
            else:
                sleep(TICK)

    def _forget(self, shard_id: int) -> bool:
        """Give a shard back that could not be prepared; True when a cached copy of it was deleted."""
        if self._cache_filelock.is_locked:
            self._cache_filelock.release(force=True)
        deleted = False
        if self.streams[self.stream_per_shard[shard_id]].has_other_copy():
            for file in self._files(shard_id):
                deleted = deleted or file.exists()
                file.unlink(missing_ok=True)
        self._shard_states[shard_id] = _ShardState.REMOTE
        self._prepared.discard(shard_id)
        return deleted

    def _failed(self, shard_id: int, problem: Exception, where: str = "") -> ShardError:
        if not hasattr(self, "_cache_filelock"):
            return ShardError(f"{self._name(shard_id)}{where} cannot be read: {problem}")
        deleted = self._forget(shard_id)
        reason = without_password(str(problem).strip() or repr(problem))
        after = " Its cached copy was deleted." if deleted else ""
        cure = "Check it at its source" if self._stream(shard_id).has_other_copy() else "Prepare or copy the data again"
        return ShardError(f"{self._name(shard_id)}{where} cannot be read: {reason}.{after} {cure}")

    def _stream(self, shard_id: int) -> GuardedStream:
        stream: GuardedStream = self.streams[self.stream_per_shard[shard_id]]
        return stream

    def _files(self, shard_id: int) -> list[Path]:
        stream = self._stream(shard_id)
        pairs = self.shards[shard_id].file_pairs
        return [
            Path(stream.local) / stream.split / info.basename for pair in pairs for info in pair if info is not None
        ]

    def _name(self, shard_id: int) -> str:
        raw, packed = self.shards[shard_id].file_pairs[0]
        return f"{self._stream(shard_id).describe()}: shard {(packed or raw).basename}"


class GuardedLoader(OutlivesSigterm, StreamingDataLoader):  # type: ignore[misc]
    """A StreamingDataLoader whose workers' errors are as short as those of the process itself.

    Args:
        args: of torch's DataLoader.
        epoch_batches: Batches of an epoch, at most; -1 as many as `len` says, None all that come. Those before a resume
            count: Composer cuts each iteration to that length, but one that resumes has only the rest to give.
        kwargs: of torch's DataLoader.
    """

    def __init__(self, *args: Any, epoch_batches: int | None = None, **kwargs: Any) -> None:
        # Each new iterator draws a seed for its workers: from a generator of its own, or the model's random numbers
        # would depend on whether the workers are still there (as in a run) or new (as after a resume).
        super().__init__(*args, **{"generator": torch.Generator(), **kwargs})
        self.epoch_batches = epoch_batches

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or those that a resumed epoch has left.

        Raises:
            ShardError: As the dataset says, or no batch came within `timeout` seconds.
        """
        left = self._batches_left()
        try:
            for batch in super().__iter__():
                if left is not None:
                    if left <= 0:  # the iteration had to begin nevertheless: that is what ends the resumed epoch
                        return
                    left -= 1
                yield batch
                if left == 0:
                    return
        except UserError as problem:
            self._stop_workers()
            kind = type(problem)
            message = str(problem).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()
            raise kind(message) from problem
        except RuntimeError as problem:
            if "timed out" not in str(problem):
                raise
            self._stop_workers()
            raise ShardError(
                f"no batch from the loader's workers within {self.timeout:.0f} s: the storage hangs, or reading takes "
                "longer than that (timeout in the loader's block)"
            ) from problem

    def _batches_left(self) -> int | None:
        """How many batches the epoch that begins now may give; None for no limit."""
        if self.epoch_batches is None:
            return None
        most = len(self) if self.epoch_batches < 0 else min(self.epoch_batches, len(self))
        data: GuardedDataset = self.dataset
        world = data._parallel_rank_world
        _, samples = data._resume(world, data.next_epoch)
        done: int = ceil(samples / (self.batch_size * world.num_ranks))
        return most - done

    def _stop_workers(self) -> None:
        """Stop persistent workers now: left to the garbage collector, they would keep a failing run for seconds."""
        if self._iterator is not None and hasattr(self._iterator, "_shutdown_workers"):
            self._iterator._shutdown_workers()
