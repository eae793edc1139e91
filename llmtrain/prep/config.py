"""What a data recipe (`data_prep/*.yaml`) may say."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtrain.config.base import Config
from llmtrain.prep.stages.config import StageConfig

_NAMES_OF_FILES = {"prep.json", "mixture.yaml", "tokenizer"}  # in an output
_SHARD_LIMIT = 2**32  # MDS keeps the offsets of samples in uint32


class TokenizerTraining(Config):
    """A byte-level BPE tokenizer, trained on the training documents of this very recipe."""

    vocab_size: int = Field(ge=257)
    """Ids, the special tokens and the 256 bytes included."""
    eos_token: str = "<|endoftext|>"
    """Stands between documents; also the tokenizer's BOS, padding and unknown token, as in GPT-2 and GPT-NeoX."""
    special_tokens: list[str] = Field(default_factory=list)
    """Further tokens that are never split (`<|im_start|>`)."""
    max_bytes: int = Field(default=10_000_000, gt=0)
    """Text to train on: each source gives the same share of it, from its beginning."""
    min_frequency: int = Field(default=2, ge=1)
    """A pair of tokens that occurs less often is not merged."""


class PrepTokenizer(Config):
    """An existing tokenizer by `name`, or one that is trained here."""

    name: str | None = None
    """A name on the Hugging Face hub, or a local folder with a `tokenizer.json`."""
    train: TokenizerTraining | None = None
    """Train one; it is written to `OUT/tokenizer`."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.name is None) == (self.train is None):
            raise ValueError("give either name (an existing tokenizer) or train (a new one)")
        return self


class SourcePlace(Config):
    """Where the rows of a source come from: files (`files`), or a dataset of the Hugging Face hub (`hf_name`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the source in messages and totals, and its folder under `split_by_source`."""
    files: list[str] | None = None
    """Paths and globs (`**` for any depth). `{stdlib}` stands for the folder of Python's standard library."""
    exclude: list[str] = Field(default_factory=list)
    """Globs of files to leave out; also with `{stdlib}`."""
    order: Literal["name", "shuffled"] = "name"
    """Order of the files: by path, or shuffled in an order that depends on the paths alone."""
    hf_name: str | None = None
    """Dataset for `datasets.load_dataset`, read as a stream: nothing is downloaded beforehand."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    hf_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `load_dataset` (`name: en`, `data_dir: ...`)."""
    proportion: float | None = Field(default=None, gt=0)
    """Share of this source in training. The loader does the mixing, so it needs `split_by_source: true`."""
    repeat: float | None = Field(default=None, gt=0)
    """How many times an epoch sees this source: 2 up-samples it, 0.5 takes another half of it each time. Instead of
    `proportion`; needs `split_by_source: true`, too."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.files is None) == (self.hf_name is None):
            raise ValueError("give either files or hf_name")
        if self.files is not None and not self.files:
            raise ValueError("files is empty")
        if self.hf_name is None and self.hf_kwargs:
            raise ValueError("hf_kwargs needs hf_name")
        if self.proportion is not None and self.repeat is not None:
            raise ValueError("give proportion or repeat, not both: each alone says how much of a source is seen")
        if {"streaming", "split", "trust_remote_code"} & set(self.hf_kwargs):
            raise ValueError("hf_kwargs may not set streaming, split or trust_remote_code")
        return self


class SourceConfig(SourcePlace):
    """A source of documents. What is for validation depends on the source's name, the file's, and the place in it."""

    format: Literal["auto", "text", "jsonl", "parquet", "python_literals"] = "auto"
    """`auto` goes by the name: `.jsonl`, `.ndjson` and `.json` have an object a line, `.parquet` rows, anything else is
    text, one document a file; `.gz` and `.zst` are decompressed. `python_literals`: each string of the dict that a
    Python file assigns is a document."""
    text_column: str = "text"
    """Column or key with the text."""
    join: Literal["file", "folder"] | None = None
    """Make one long document of several texts that belong together: `file` of all rows of a file, `folder` of all files
    below one folder (the first one at or below the pattern's first wildcard), in the order of their paths."""
    header: str | None = None
    """With `join`: a line before each file's text; `{path}` stands for its path from the pattern's first wildcard."""
    into: Literal["train", "val"] | None = None
    """Split that the whole source goes to; null divides it by `val_fraction`."""
    max_documents: int | None = Field(default=None, gt=0)
    """Stop after this many documents, bad ones (`on_error: skip`) not counted."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Stop before the document (UTF-8) that would go beyond this many bytes."""

    @model_validator(mode="after")
    def _joins_files(self) -> Self:
        if self.join is not None and self.files is None:
            raise ValueError("join puts the texts of files together: give files")
        if self.header is not None and self.join is None:
            raise ValueError("header stands before each file of a joined document: give join")
        return self


class DataRecipe(Config):
    """What every data recipe has."""

    out: str = Field(min_length=1)
    """Folder to make."""
    split_by_source: bool = False
    """Write `OUT/SOURCE/train` for each source instead of one `OUT/train`, for mixtures."""
    compression: str | None = Field(default="zstd:1", pattern=r"^zstd(:([1-9]|1[0-9]|2[0-2]))?$")
    """`zstd:LEVEL`, or null."""
    hashes: list[Literal["md5", "sha1", "sha256", "sha512", "xxh32", "xxh64", "xxh128", "xxh3_64", "xxh3_128"]] = Field(
        default_factory=lambda: ["xxh64"]  # type: ignore[arg-type]
    )
    """Hashes of each shard that go to the index; the loader checks what it downloads against them."""
    size_limit: int = Field(default=1 << 26, gt=0, lt=_SHARD_LIMIT)
    """Most bytes in a shard, uncompressed."""
    overwrite: bool = False
    """Replace what an earlier, different `llmtrain prep` wrote to `out`."""
    variables: dict[str, Any] = Field(default_factory=dict)
    """Free-form values for `${variables.x}`."""

    @field_validator("hashes")
    @classmethod
    def _sorted_and_unique(cls, hashes: list[Any]) -> list[Any]:
        return sorted(set(hashes))  # what Streaming demands


class PrepRecipe(DataRecipe):
    """Raw text to MDS shards: documents are tokenised and cut to rows of `max_seq_len` tokens."""

    task: Literal["pretraining"] = "pretraining"
    """What the shards are for; `finetuning` is another kind of recipe (`ConversationRecipe`)."""
    max_seq_len: int = Field(gt=1)
    """Tokens in a row of the shards."""
    tokenizer: PrepTokenizer
    """The tokenizer."""
    sources: list[SourceConfig] = Field(min_length=1)
    """The corpora, read in this order."""
    on_error: Literal["fail", "skip"] = "fail"
    """What happens at a row or file that cannot be read (bad JSON, no UTF-8, no text, a truncated archive, ...): `fail`
    stops and names it; `skip` leaves it out, and `prep.json` and the totals say how many there were and where the first
    ones are. Of a file that breaks off, what stands before the break is read. An empty document is no error."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the documents that goes to `val` instead of `train`: decided by a hash of source and document number."""
    eos: bool = True
    """End each document with the tokenizer's EOS."""
    bos: bool = False
    """Begin each document with the tokenizer's BOS."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Quality steps, carried out in this order on every document before it is tokenised. docs/data-quality.md."""
    min_document_tokens: int = Field(default=1, ge=1)
    """Drop documents with fewer tokens (EOS and BOS not counted). `min_tokens` in older recipes."""
    partition_bytes: int | None = Field(default=None, gt=0)
    """Input that is one unit of work, in bytes as it lies there; the shards depend on it. Null: a sixteenth of all of
    it, at least 1 MiB, at most 32 MiB or, where that is more, 1/4096 of all of it."""
    cut: Literal["stream", "documents"] = "stream"
    """`stream`: documents are joined end to end, and a row may hold several of them, or parts. `documents`: a row holds
    consecutive tokens of one document and nothing else; documents shorter than a row are dropped and counted."""
    tail: Literal["overlap", "drop"] = "overlap"
    """With `cut: documents`, what is left of a document behind its last full row: `overlap` adds a row that ends where
    the document ends, and so repeats tokens of the row before it; `drop` leaves it out. Both are counted."""

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "min_tokens" in data and "min_document_tokens" not in data:
            return {"min_document_tokens" if key == "min_tokens" else key: value for key, value in data.items()}
        return data

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        check_sources(self.sources, self.split_by_source)
        if self.cut == "stream" and "tail" in self.model_fields_set and self.tail == "drop":
            raise ValueError("tail: drop needs cut: documents; in a stream documents have no tail")
        return self

    def splits_of(self, source: SourceConfig) -> tuple[str, ...]:
        """The splits that a source is written to."""
        if source.into is not None:
            return (source.into,)
        return ("train", "val") if self.val_fraction else ("train",)

    def has_validation(self) -> bool:
        """Whether a split `val` is written."""
        return any("val" in self.splits_of(source) for source in self.sources)


def check_sources(sources: Sequence[SourcePlace], split_by_source: bool) -> None:
    """Raise ValueError when sources share a name, or proportions are given to some or cannot be applied."""
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"sources share a name: {', '.join(twice)}")
    if split_by_source and (taken := sorted(_NAMES_OF_FILES & set(names))):
        raise ValueError(f"a source gets a folder of its name, and {', '.join(taken)} is another file there")
    with_share = [source.name for source in sources if source.proportion is not None]
    for key in ("proportion", "repeat"):
        if not split_by_source and any(getattr(source, key) is not None for source in sources):
            raise ValueError(f"{key} is applied by the loader, source by source: set split_by_source: true")
    if with_share and len(with_share) != len(names):
        without = ", ".join(name for name in names if name not in with_share)
        raise ValueError(f"either all sources have a proportion or none; these have none: {without}")
