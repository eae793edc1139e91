"""The `text` loader: rows of token ids from MDS shards, for pretraining."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.data.batch import NO_SAMPLE, TextCollator
from llmtrain.data.config import StreamConfig, TextDatasetConfig, TextLoaderConfig
from llmtrain.data.evaluation import EveryRowOnce
from llmtrain.data.fixed_rows import FixedRows
from llmtrain.data.guarded_streaming import GuardedDataset, GuardedLoader, GuardedStream
from llmtrain.data.shards import prepared_with, require_index
from llmtrain.data.shared_cache import default_folder
from llmtrain.errors import UserError

log = logging.getLogger(__name__)


class TextDataset(GuardedDataset):
    """Rows of exactly `max_seq_len` token ids.

    Args:
        cfg: What to read and in which order.
        vocab_size: Ids that the model has; a row with a larger one is refused.
        batch_size: Rows in a batch of one device.

    Attributes:
        source_names: of a mixture's streams; () where there is no mixture.
        always_with_ids: rows say which they are, whether or not the recipe asks for it.
    """

    always_with_ids = True

    def __init__(self, cfg: TextDatasetConfig, *, vocab_size: int, batch_size: int) -> None:
        self.source_names = tuple(cfg.streams or ())
        self.max_seq_len = cfg.max_seq_len
        self.vocab_size = vocab_size
        self._bytes_dtype = np.dtype(cfg.token_encoding_type)
        self._with_ids = cfg.return_sample_ids or self.always_with_ids
        super().__init__(
            streams=_streams(cfg),
            split=cfg.split,
            download_retry=cfg.download_retry,
            download_timeout=cfg.download_timeout,
            validate_hash=cfg.validate_hash,
            keep_zip=cfg.keep_zip,
            epoch_size=cfg.epoch_size,
            predownload=cfg.predownload,
            cache_limit=cfg.cache_limit,
            sampling_method=cfg.sampling_method,
            sampling_granularity=cfg.sampling_granularity,
            partition_algo=cfg.partition_algo,
            num_canonical_nodes=cfg.num_canonical_nodes,
            batch_size=batch_size,
            shuffle=cfg.shuffle,
            shuffle_algo=cfg.shuffle_algo,
            shuffle_seed=cfg.shuffle_seed,
            shuffle_block_size=cfg.shuffle_block_size,
            batching_method=cfg.batching_method,
            allow_unsafe_types=cfg.allow_unsafe_types,
            replication=cfg.replication,
        )
        # With a limit a shard may be deleted at any time; an open file would keep its bytes on the disk.
        self._rows = FixedRows(self.shards) if self.cache_limit is None else None
        # Never left to Streaming, which would go by the number of machines.
        self.num_canonical_nodes = cfg.num_canonical_nodes or canonical_nodes(self._smallest_part(), cfg.shuffle)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """One row: `tokens`, (max_seq_len,) of an integer dtype, and `sample_id`; of a mixture also `stream_id`, the
        number of the stream.

        Raises:
            UserError: The row is too short, or has an id that the model does not know; names shard and row.
            ShardError: Its shard is missing or damaged.
        """
        shard_id, place = self.spanner[sample_id]
        tokens: Any = self._rows.read(shard_id, place) if self._rows is not None else None
        if tokens is None:
            tokens = super().get_item(sample_id, retry)["tokens"]
        if isinstance(tokens, bytes):
            tokens = self._from_bytes(tokens, sample_id)
        if tokens.ndim != 1 or len(tokens) < self.max_seq_len or tokens.dtype.kind not in "iu":
            raise UserError(
                f"{self.place(sample_id)}: expected at least max_seq_len = {self.max_seq_len} integer tokens, "
                f"found {tokens.dtype} {tokens.shape}"
            )
        tokens = tokens[: self.max_seq_len]
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"{self.place(sample_id)}: token id {low if low < 0 else high} is outside of the model's vocabulary of "
                f"{self.vocab_size}. Were these shards made with another tokenizer (or is token_encoding_type wrong)?"
            )
        row: dict[str, Any] = {"tokens": tokens}
        if self._with_ids:
            row["sample_id"] = sample_id
        if self.source_names:
            row["stream_id"] = self.stream_per_shard[shard_id]
        return row

    def _smallest_part(self) -> int:
        """Rows of an epoch that are cut into canonical nodes together: all, or with some batching a stream's."""
        if self.batching_method == "random":
            return int(self.epoch_size)
        return min(int(stream.choose) for stream in self.streams)

    def _from_bytes(self, data: bytes, sample_id: int) -> NDArray[Any]:
        if len(data) % self._bytes_dtype.itemsize:
            raise UserError(
                f"{self.place(sample_id)}: {len(data)} bytes are no whole number of {self._bytes_dtype.name}: "
                "set token_encoding_type to the type that the shards were written with"
            )
        return np.frombuffer(data, self._bytes_dtype)

    def place(self, sample_id: int) -> str:
        """Where a row comes from: shard and row."""
        shard_id, row = self.spanner[sample_id]
        return f"{self._name(shard_id)}, row {row}"


class TextEvaluationDataset(EveryRowOnce, TextDataset):
    """Rows for an evaluation: each exactly once over all ranks. With a `sample_id` where the recipe asks for it."""

    always_with_ids = False

    def blank_row(self) -> dict[str, Any]:
        """A row of token 0 whose labels the collator makes -100; its `sample_id` is -1."""
        row = {"tokens": np.zeros(self.max_seq_len, np.int64), "blank": True}
        if self._with_ids:
            row["sample_id"] = NO_SAMPLE
        return {**row, "stream_id": 0} if self.source_names else row


def canonical_nodes(rows: int, shuffle: bool) -> int:
    """Into how many parts rows are cut when the recipe does not say: depends on the data alone, not on the machines.

    1 for unshuffled rows: they come in their order, each once. For shuffled rows the largest power of two up to 64
    that leaves 1000 rows to each part: parts are made equal by repeating rows, one in a thousand at most.
    """
    parts = 64 if shuffle else 1
    while parts > 1 and rows < 1000 * parts:
        parts //= 2
    return parts


def build_text_loader(
    cfg: TextLoaderConfig,
    *,
    eos_token_id: int | None,
    tokenizer_fingerprint: str,
    vocab_size: int,
    device_batch_size: int,
    evaluation: bool = False,
    epoch_batches: int | None = None,
    sequence_parallel_degree: int = 1,
) -> GuardedLoader:
    """Open the shards, check that they fit the run, and make the loader. All ranks call it together.

    Args:
        cfg: The loader's block of the recipe.
        eos_token_id: The tokenizer's.
        tokenizer_fingerprint: `llmtrain.tokenizer.fingerprint` of the run's tokenizer.
        vocab_size: Of the model (at least the tokenizer's).
        device_batch_size: Rows in a batch of one device.
        evaluation: Give all ranks together each row exactly once, see `EveryRowOnce`.
        epoch_batches: Limit of an epoch, see `GuardedLoader`.
        sequence_parallel_degree: This many consecutive ranks get the same rows, which count once.

    Returns:
        A loader of dicts as `TextCollator` makes them. Its state (`state_dict`, `load_state_dict`) is Streaming's.

    Raises:
        UserError: There are no shards, or they do not fit the tokenizer, `max_seq_len` or the batch size.
        ShardError: While it is iterated, see `GuardedDataset`.
    """
    data = cfg.dataset
    if sequence_parallel_degree > 1:
        data = data.model_copy(update={"replication": sequence_parallel_degree})
    _check_boundary(data, eos_token_id)
    for _, key, stream in _named_streams(data):
        split = stream.split if stream.split is not None else data.split or ""
        if stream.remote is None:
            require_index(Path(stream.local or "") / split, key + "local")
        elif "://" not in stream.remote:
            require_index(Path(stream.remote) / split, key + "remote")
    kind = TextEvaluationDataset if evaluation else TextDataset
    try:
        dataset = kind(data, vocab_size=vocab_size, batch_size=device_batch_size)
    except ValueError as problem:  # Streaming's own checks of its arguments
        raise UserError(f"dataset: {problem}") from problem
    dataset.counted_once = sequence_parallel_degree > 1
    for stream in dataset.streams:
        _check_origin(stream, data, tokenizer_fingerprint)
    _check_amounts(dataset, cfg, device_batch_size)
    workers = cfg.num_workers
    return GuardedLoader(
        dataset,
        batch_size=device_batch_size,
        collate_fn=TextCollator(eos_token_id=data.eos_token_id, bos_token_id=data.bos_token_id),
        drop_last=cfg.drop_last,
        num_workers=workers,
        pin_memory=cfg.pin_memory and torch.cuda.is_available(),
        prefetch_factor=cfg.prefetch_factor if workers else None,
        persistent_workers=cfg.persistent_workers and workers > 0,
        timeout=cfg.timeout if workers else 0,
        epoch_batches=epoch_batches,
    )


def _named_streams(cfg: TextDatasetConfig) -> list[tuple[str, str, StreamConfig]]:
    """Name, prefix of its keys in messages, and config of each stream."""
    if cfg.streams is not None:
        return [(name, f"dataset.streams.{name}.", stream) for name, stream in cfg.streams.items()]
    return [("", "dataset.", StreamConfig(local=cfg.local, remote=cfg.remote))]


def _streams(cfg: TextDatasetConfig) -> list[GuardedStream]:
    streams = []
    for name, _, settings in _named_streams(cfg):
        if settings.local is None and settings.remote is not None:
            settings = settings.model_copy(update={"local": default_folder(settings.remote)})
            log.info("stream %r has no local: its shards are cached in %s", name, settings.local)
        stream = GuardedStream(**settings.model_dump())
        stream.name = name
        stream.max_seq_len = cfg.max_seq_len
        streams.append(stream)
    return streams


def _check_boundary(cfg: TextDatasetConfig, eos_token_id: int | None) -> None:
    given = cfg.eos_token_id
    if given is not None and given != eos_token_id and not cfg.override_eos_token_id_mismatch_error:
        raise UserError(
            f"dataset.eos_token_id is {given}, but the tokenizer's is {eos_token_id}. Use the tokenizer's, or set "
            "override_eos_token_id_mismatch_error: true when the shards really have the other one"
        )


def _check_origin(stream: GuardedStream, cfg: TextDatasetConfig, tokenizer_fingerprint: str) -> None:
    made = prepared_with(Path(stream.local) / stream.split)
    theirs = None if made is None else made.get("tokenizer_fingerprint")
    if theirs is None:
        log.info("%s was not made by llmtrain prep: its tokenizer cannot be compared", stream.describe())
    elif theirs != tokenizer_fingerprint and not cfg.override_tokenizer_mismatch_error:
        raise UserError(
            f"{stream.describe()} was made with another tokenizer (fingerprint {theirs[:12]}) than the recipe's "
            f"({tokenizer_fingerprint[:12]}). Set tokenizer.name to the one that made the data, or prepare it again"
        )


def _check_amounts(dataset: TextDataset, cfg: TextLoaderConfig, device_batch_size: int) -> None:
    nodes = dataset._parallel_rank_world.num_nodes
    canonical = dataset.num_canonical_nodes
    if canonical % nodes and nodes % canonical and not isinstance(dataset, EveryRowOnce):
        raise UserError(
            f"dataset.num_canonical_nodes: {canonical} is no multiple or divisor of the run's {nodes} nodes. "
            f"Set it to a multiple of {nodes}, and keep it when the number of nodes changes"
        )
    if dataset._smallest_part() < canonical:
        raise UserError(
            f"dataset.num_canonical_nodes: {canonical} parts are too many for {dataset._smallest_part()} rows"
        )
    if cfg.drop_last and len(dataset) < device_batch_size:
        raise UserError(
            f"the data has {dataset.epoch_size:,} rows, {len(dataset):,} a device: not one full batch of "
            f"{device_batch_size}. Use a smaller batch, more data, or drop_last: false"
        )
    for stream, rows in zip(dataset.streams, dataset.samples_per_stream, strict=True):
        log.info("%s: %d rows, %d of them an epoch (%.3g times)", stream.describe(), rows, stream.choose, stream.repeat)
