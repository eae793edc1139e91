"""What `train_loader` and `eval_loader` may say for `name: text`. Light: imports neither torch nor streaming."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtrain.config.base import Config
from llmtrain.errors import UserError

TokenEncoding = Literal["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


class StreamConfig(Config):
    """One source of a mixture: a folder of MDS shards, and how much of it is seen in an epoch.

    At most one of `proportion`, `repeat` and `choose` may be given, and either all streams of a mixture have a
    `proportion` or none has (Streaming's rule).
    """

    local: str | None = None
    """Folder on this machine: the shards themselves when there is no `remote`, otherwise the cache."""
    remote: str | None = None
    """Where the shards are downloaded from (`s3://...`, `gs://...`, another folder, ...)."""
    split: str | None = None
    """Sub-folder of `local` and `remote`; the dataset's `split` when left out."""
    proportion: float | None = Field(default=None, gt=0)
    """Share of the samples of an epoch, relative to the other streams' proportions."""
    repeat: float | None = Field(default=None, gt=0)
    """How many times this stream is seen in an epoch."""
    choose: int | None = Field(default=None, gt=0)
    """How many samples of this stream are seen in an epoch."""
    download_retry: int | None = Field(default=None, ge=1)
    """Overrides the dataset's."""
    download_timeout: float | None = Field(default=None, gt=0)
    """Seconds; overrides the dataset's."""
    validate_hash: str | None = None
    """Overrides the dataset's."""
    keep_zip: bool | None = None
    """Overrides the dataset's."""

    @model_validator(mode="after")
    def _one_weight_and_one_place(self) -> Self:
        if sum(weight is not None for weight in (self.proportion, self.repeat, self.choose)) > 1:
            raise ValueError("give only one of proportion, repeat, choose")
        if self.local is None and self.remote is None:
            raise ValueError("give local (a folder on this machine), remote, or both")
        return self


def check_weights(streams: Mapping[str, StreamConfig]) -> None:
    """Raise ValueError when there are no streams, or only some have a proportion."""
    if not streams:
        raise ValueError("streams is empty")
    without = [name for name, stream in streams.items() if stream.proportion is None]
    if 0 < len(without) < len(streams):
        raise ValueError(f"either all streams have a proportion or none; these have none: {', '.join(without)}")


def _or_path(schema: dict[str, Any]) -> None:
    schema["anyOf"].insert(1, {"type": "string"})


class TextDatasetConfig(Config):
    """Tokenised rows in MDS shards. Names and defaults are llm-foundry's, except where the text says so."""

    max_seq_len: int = Field(gt=0)
    """Tokens in a row. Longer rows of the shards are cut, shorter ones are an error."""
    local: str | None = None
    """Folder on this machine: the shards themselves when there is no `remote`, otherwise the cache."""
    remote: str | None = None
    """Where the shards are downloaded from."""
    streams: dict[str, StreamConfig] | None = Field(default=None, json_schema_extra=_or_path)
    """A mixture, by name, or the path of a YAML file with one (`mixture.yaml` of `llmtrain prep`); instead of `local`
    and `remote`."""
    split: str | None = None
    """Sub-folder of `local` and `remote`."""
    shuffle: bool = False
    """Shuffle the order of the rows, anew in each epoch."""
    shuffle_algo: Literal["py1e", "py1s", "py2s", "py1b", "py1br", "naive"] = "py1e"
    """Streaming's shuffling algorithm."""
    shuffle_seed: int = Field(default=9176, ge=0)
    """Decides the order of the rows; kept in checkpoints."""
    shuffle_block_size: int | None = Field(default=None, gt=0)
    """Rows shuffled among each other; Streaming's own choice when left out."""
    num_canonical_nodes: int | None = Field(default=None, gt=0)
    """How many parts the rows are cut into before they go to the nodes; a multiple or a divisor of the number of
    nodes. When left out, llmtrain decides by the amount of data alone: 1 for unshuffled data, up to 64 for shuffled
    (see `canonical_nodes`). llm-foundry goes by the number of nodes, so that the order of the samples changes with
    it. To make the parts equal, up to that many rows less one come twice in an epoch; with 1 none does."""
    epoch_size: int | str | None = None
    """Samples in an epoch when streams have proportions; the sum of all streams' samples when left out."""
    batching_method: Literal["random", "stratified", "per_stream", "device_per_stream"] = "random"
    """How the streams of a mixture share a batch. With `device_per_stream`, alone of them, batches depend on the number
    of ranks."""
    sampling_method: Literal["balanced", "fixed"] = "balanced"
    """Whether another subset of a down-sampled stream is drawn in each epoch."""
    sampling_granularity: int = Field(default=1, gt=0)
    """Samples that are drawn from one shard at a time, for the last partial repeat of a stream."""
    partition_algo: Literal["relaxed", "orig"] = "relaxed"
    """Streaming's partitioning algorithm."""
    predownload: int | None = Field(default=None, gt=0)
    """Samples a worker downloads ahead; 8 x the device batch size when left out."""
    cache_limit: int | str | None = None
    """Most bytes that the local cache may hold (`100gb`); without a limit when left out."""
    download_retry: int = Field(default=6, ge=1)
    """Attempts at a file, in all, a growing pause apart (llm-foundry's default is 2). One that the storage does not
    have, or does not give out, is not tried again."""
    download_timeout: float = Field(default=60, gt=0)
    """Seconds a shard may take."""
    validate_hash: str | None = None
    """Hash that downloaded shards are checked against. When left out, llmtrain takes the first one that the shards
    have (llm-foundry checks nothing)."""
    keep_zip: bool = False
    """Keep the compressed shard beside the decompressed one."""
    allow_unsafe_types: bool = False
    """Accept shards with pickled columns. They can run any code on this machine, so it needs `--trust-code`, too."""
    token_encoding_type: TokenEncoding = "int64"
    """Integer type of the tokens, for old shards whose `tokens` column is plain bytes."""
    eos_token_id: int | None = Field(default=None, ge=0)
    """Adds `sequence_id` to a batch: which document a token belongs to. The EOS belongs to the document it ends."""
    bos_token_id: int | None = Field(default=None, ge=0)
    """The same for shards whose documents begin with BOS. Not together with `eos_token_id`."""
    override_eos_token_id_mismatch_error: bool = False
    """Accept an `eos_token_id` that is not the tokenizer's."""
    override_bos_token_id_mismatch_error: bool = False
    """Accept a `bos_token_id` that is not the tokenizer's."""
    override_tokenizer_mismatch_error: bool = False
    """Accept shards that `llmtrain prep` made with another tokenizer than the recipe's. (llmtrain's own.)"""
    replication: int | None = Field(default=None, gt=1)
    """Give the same samples to this many consecutive ranks."""
    return_sample_ids: bool = False
    """Add `sample_id`, int64 (B,), the row's number in the whole dataset, to the batches of an evaluation. Those of
    training always have it. (llmtrain's own.)"""

    @field_validator("streams", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        from llmtrain.data.mixture import read_mixture

        try:
            return read_mixture(value)
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.streams is not None and (self.local is not None or self.remote is not None):
            raise ValueError("give streams, or local and remote, not both")
        if self.streams is None and self.local is None and self.remote is None:
            raise ValueError("no data: give local (a folder on this machine), remote, or streams")
        if self.streams is not None:
            check_weights(self.streams)
        if self.eos_token_id is not None and self.bos_token_id is not None:
            raise ValueError("give eos_token_id or bos_token_id, not both: each alone marks where a document ends")
        return self


class TextLoaderConfig(Config):
    """`train_loader` / `eval_loader` with `name: text`: rows of tokens, documents joined and cut."""

    name: Literal["text"] = "text"
    """Which loader."""
    dataset: TextDatasetConfig
    """Where the rows come from and in which order."""
    drop_last: bool = True
    """Drop the last batch of an epoch when it is not full."""
    num_workers: int = Field(default=8, ge=0)
    """Processes that read ahead, per rank; 0 reads in the training process."""
    prefetch_factor: int = Field(default=2, gt=0)
    """Batches that each worker holds ready."""
    persistent_workers: bool = True
    """Keep the workers between epochs."""
    pin_memory: bool = True
    """Copy batches into page-locked memory; only has an effect where there is a GPU."""
    timeout: float = Field(default=600, ge=0)
    """Seconds to wait for a worker's batch before the run fails; 0 waits for ever."""
