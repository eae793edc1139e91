"""What `train_loader` and `eval_loader` may say for `name: finetuning`. Light: imports neither torch nor streaming."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmtrain.config.base import Config, mistake


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class SourceConfig(Config):
    """Where examples come from: files, a Hugging Face dataset, or a folder of MDS shards. Exactly one of them."""

    files: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Files on this machine, or glob patterns: .jsonl, .json, .csv, .parquet, also .gz and .zst. (llmtrain's own.)"""
    hf_name: str | None = None
    """A dataset on the Hugging Face hub; a local folder of one; `json`, `csv` or `parquet` with `hf_kwargs.data_files`;
    or a folder in an object store that holds SPLIT.jsonl (or .json, .csv, .parquet)."""
    hf_kwargs: dict[str, Any] | None = None
    """Passed to `datasets.load_dataset` (`name`, `data_files`, `revision`, ...)."""
    safe_load: bool = False
    """Take only data files from `hf_name`; anything else there is an error."""
    local: str | None = None
    """Folder of MDS shards on this machine; with `remote`, the folder they are downloaded to."""
    remote: str | None = None
    """Where MDS shards are downloaded from (`s3://...`, `gs://...`, another folder, ...)."""
    split: str | None = None
    """Split of the Hugging Face dataset; sub-folder of `local` and `remote`."""
    preprocessing_fn: str | dict[str, str] | None = None
    """How a row becomes an example: the name of a known dataset, `package.module:function`, or a mapping of columns
    (`{prompt: question, response: answer}`, `{messages: dialog}`). When left out: the one known for `hf_name`, else the
    columns are recognised: prompt and response (or completion), messages, conversations, turns."""
    download_retry: int | None = Field(default=None, ge=1)
    """Attempts at a shard, in all; 6 when left out."""
    download_timeout: float | None = Field(default=None, gt=0)
    """Seconds a shard may take; 60 when left out."""
    validate_hash: str | None = None
    """Hash that downloaded shards are checked against; the first one that the shards have when left out."""
    keep_zip: bool | None = None
    """Keep compressed shards beside the decompressed ones; no when left out."""
    limit: int | None = Field(default=None, gt=0)
    """Read at most so many rows of each source: for trials. (llmtrain's own.)"""

    def kinds(self) -> dict[str, str]:
        """The kinds of source that are named: kind -> the keys that name it."""
        named = {
            "files": ["files"] if self.files else [],
            "Hugging Face": [key for key in ("hf_name", "hf_kwargs") if getattr(self, key) is not None],
            "MDS shards": [key for key in ("local", "remote") if getattr(self, key) is not None],
        }
        return {kind: ", ".join(keys) for kind, keys in named.items() if keys}


class FinetuningStreamConfig(SourceConfig):
    """One source of a mixture, and how much of it is seen in an epoch.

    At most one of `proportion`, `repeat` and `choose` may be given, and either all streams have a `proportion` or none.
    """

    proportion: float | None = Field(default=None, gt=0)
    """Share of the examples of an epoch, relative to the other streams' proportions."""
    repeat: float | None = Field(default=None, gt=0)
    """How many times this source is seen in an epoch; 0.5 takes one half in one epoch and the other in the next."""
    choose: int | None = Field(default=None, gt=0)
    """How many examples of this source are seen in an epoch."""

    @model_validator(mode="after")
    def _one_kind_and_one_weight(self) -> Self:
        _check_source(self)
        if sum(weight is not None for weight in (self.proportion, self.repeat, self.choose)) > 1:
            raise ValueError("give only one of proportion, repeat, choose")
        return self


class FinetuningDatasetConfig(SourceConfig):
    """Examples to fine-tune on. Names and defaults are llm-foundry's, except where the text says so."""

    max_seq_len: int = Field(gt=0)
    """Tokens in a row; no example is longer."""
    streams: dict[str, FinetuningStreamConfig] | None = None
    """A mixture of sources of any kind, by name; instead of a single source. What a stream leaves out (split,
    preprocessing_fn, limit, download_...) is taken from here."""
    decoder_only_format: bool | None = None
    """Accepted for old recipes; only decoder-only models are trained."""

    target_prompts: Annotated[str, BeforeValidator(_lower)] = Field(
        default="none", pattern=r"^(none|all|length>=0*[1-9][0-9]*)$"
    )
    """Which prompts are trained as well: `none`, `all`, or `length>=N` (those of at least N tokens)."""
    target_responses: Annotated[Literal["last", "all"], BeforeValidator(_lower)] = "last"
    """Which responses are trained: the `last` of a conversation, or `all`."""
    long_examples: Literal["truncate", "drop"] = "truncate"
    """What happens to an example of more than max_seq_len tokens: its end is cut off, or it is dropped. One of which
    no trained token is left is dropped in both cases. (llmtrain's own.)"""
    strict: bool = False
    """The first row that nothing can be learnt from is an error; otherwise such rows are dropped and counted.
    (llmtrain's own.)"""

    shuffle: bool = False
    """Shuffle the order of the examples, anew in each epoch."""
    shuffle_seed: int = Field(default=9176, ge=0)
    """Decides the order; kept in checkpoints."""
    epoch_size: int | None = Field(default=None, gt=0)
    """Examples in an epoch when streams have proportions; all streams' examples together when left out."""

    packing: bool = False
    """Put several examples into a row, best fit first. None is cut, none is lost, and none sees another one (that needs
    model.attn_config.attn_uses_sequence_id: true). Batch sizes count rows. (llmtrain's own.)"""
    packing_ratio: Literal["auto"] | Annotated[float, Field(ge=1)] | None = None
    """llm-foundry's switch for packing. `auto` or more than 1 means `packing: true`: the ratio itself is not needed."""
    packing_window: int = Field(default=1024, gt=0)
    """Examples that are packed with each other. Larger ones fill rows better (256: about 99%, 1024: 99.7%).
    (llmtrain's own.)"""
    max_leftover_bins_to_keep: int | None = Field(default=None, ge=0)
    """Accepted for old recipes; no leftover is ever thrown away."""
    allow_pad_trimming: bool = False
    """Make a batch shorter than max_seq_len where it is all padding, to a multiple of 8."""
    pad_to_longest: bool = False
    """Make a batch as short as its longest row."""
    eos_token_id: int | None = Field(default=None, ge=0)
    """Accepted for old recipes; examples end with the tokenizer's EOS."""

    streaming: bool = False
    """Tokenize and pack MDS shards while they are read, instead of all of them before the first step. How many batches
    an epoch has is then unknown: give max_duration and schedules in batches or tokens. (llmtrain's own.)"""
    cache_dir: str | None = None
    """Where tokenized examples are kept for the next run, and shards of a `remote` without `local`:
    $XDG_CACHE_HOME/llmtrain/examples (or ~/.cache/...) when left out. (llmtrain's own.)"""
    allow_unsafe_types: bool = False
    """Accept shards with pickled columns. They can run any code on this machine, so it needs `--trust-code`, too."""
    token_encoding_type: Literal["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"] = "int64"
    """Integer type of the ids in old shards whose `input_ids` and `labels` are plain bytes."""

    shuffle_algo: str | None = None
    """Accepted for old recipes; there is one way of shuffling: all examples among each other."""
    shuffle_block_size: int | None = None
    """Accepted for old recipes, without effect."""
    num_canonical_nodes: int | None = None
    """Accepted for old recipes; the order does not depend on the number of nodes."""
    predownload: int | None = None
    """Accepted for old recipes, without effect."""
    cache_limit: int | str | None = None
    """Accepted for old recipes, without effect."""
    partition_algo: str | None = None
    """Accepted for old recipes, without effect."""
    batching_method: str | None = None
    """Accepted for old recipes; the streams are mixed at random."""
    sampling_method: str | None = None
    """Accepted for old recipes; what an epoch leaves out of a stream comes in the next one."""
    sampling_granularity: int | None = None
    """Accepted for old recipes, without effect."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (
        *("max_leftover_bins_to_keep", "eos_token_id", "shuffle_algo", "shuffle_block_size", "num_canonical_nodes"),
        *("predownload", "cache_limit", "partition_algo", "batching_method", "sampling_method", "sampling_granularity"),
    )
    """Keys of old recipes that are read and not used."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "packing_strategy": "Packing is always best-fit-decreasing. Remove it, and set packing: true.",
        "max_leftovers_to_keep": "No leftover is ever thrown away. Remove it.",
        "seq_parallel_replication": "Use the top-level `sequence_parallel_degree`.",
        "replication": "Every rank gets examples of its own. Remove it.",
        "data_files": "Give `files`, or `hf_name: json` with `hf_kwargs.data_files`.",
        "name": "The dataset is named by hf_name.",
    }

    @property
    def packs(self) -> bool:
        """Whether a row holds several examples."""
        return self.packing or (self.packing_ratio is not None and self.packing_ratio != 1)

    def notes(self) -> list[str]:
        """What a run should say about keys that mean something else here than in llm-foundry, or nothing."""
        said = [key for key in self.WITHOUT_EFFECT if getattr(self, key) is not None]
        notes = [f"dataset: no effect here: {', '.join(said)}"] if said else []
        if self.packs and self.packing_ratio is not None:
            notes.append(f"dataset.packing_ratio: {self.packing_ratio} switches packing on; no ratio is needed")
        return notes

    def sources(self) -> Iterator[tuple[str, str, FinetuningStreamConfig]]:
        """Name, prefix of its keys in messages, and config of each source, with what it takes from the dataset."""
        shared = {key: getattr(self, key) for key in SourceConfig.model_fields}
        if self.streams is None:
            yield "", "dataset.", FinetuningStreamConfig.model_validate(shared)
            return
        for name, stream in self.streams.items():
            own = stream.model_dump()
            own |= {key: shared[key] for key in _INHERITED if own[key] is None}
            yield name, f"dataset.streams.{name}.", FinetuningStreamConfig.model_validate(own)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.decoder_only_format is False:
            raise mistake("Only decoder-only models are trained: true, or leave it out.", "decoder_only_format")
        if self.streams is None:
            _check_source(self)
        else:
            _check_streams(self, self.streams)
        shares = self.streams and any(stream.proportion is not None for stream in self.streams.values())
        if self.epoch_size is not None and not shares:
            raise mistake(
                "It is what streams with a proportion share; without one, use choose or repeat.", "epoch_size"
            )
        for name, source in self.streams.items() if self.streams else [("", self)]:
            if source.hf_name is not None and not (source.split or self.split):
                key = f"streams.{name}.hf_name" if name else "hf_name"
                raise mistake("It needs a split: which part of the dataset (train, test, ...).", key)
        if "packing" in self.model_fields_set and not self.packing and self.packs:
            raise ValueError(f"packing: false contradicts packing_ratio: {self.packing_ratio}; remove one of them")
        if self.streaming:
            sources = self.streams.values() if self.streams else [self]
            if any(source.local is None and source.remote is None for source in sources):
                raise mistake("Only MDS shards (local, remote) can be streamed.", "streaming")
        return self


class FinetuningLoaderConfig(Config):
    """`train_loader` / `eval_loader` with `name: finetuning`: examples with a mask of what is trained."""

    name: Literal["finetuning"] = "finetuning"
    """Which loader."""
    dataset: FinetuningDatasetConfig
    """Where the examples come from, what of them is trained, and how they become rows."""
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


_INHERITED = (
    *("split", "preprocessing_fn", "limit"),
    *("download_retry", "download_timeout", "validate_hash", "keep_zip"),
)


def _check_source(source: SourceConfig) -> None:
    kinds = source.kinds()
    if not kinds:
        raise ValueError("no data: give files, hf_name, or local and/or remote (a folder of MDS shards)")
    if len(kinds) > 1:
        named = "; ".join(f"{keys} ({kind})" for kind, keys in kinds.items())
        raise ValueError(f"several sources in one: {named}. Keep one, or make each a stream of `streams`")
    if source.hf_kwargs is not None and source.hf_name is None:
        raise ValueError("hf_kwargs without hf_name: name the dataset")
    if isinstance(source.preprocessing_fn, dict) and not source.preprocessing_fn:
        raise mistake("An empty mapping; give {prompt: COLUMN, response: COLUMN}.", "preprocessing_fn")


def _check_streams(dataset: FinetuningDatasetConfig, streams: Mapping[str, FinetuningStreamConfig]) -> None:
    if not streams:
        raise mistake("It names no source.", "streams")
    if dataset.kinds():
        raise ValueError(f"give streams, or {', '.join(dataset.kinds().values())}, not both")
    with_share = [name for name, stream in streams.items() if stream.proportion is not None]
    if with_share and len(with_share) != len(streams):
        without = ", ".join(name for name in streams if name not in with_share)
        raise ValueError(f"either all streams have a proportion or none; these have none: {without}")
