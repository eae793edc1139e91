"""`llmtrain prep` for a recipe with `task: finetuning`: conversations of any source, checked, split, and written."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash
from rich.console import Console

from llmtrain.conversations import preprocessing
from llmtrain.conversations.messages import BadExample, Chat, PromptResponse
from llmtrain.conversations.rows import identity_of_dataset
from llmtrain.data.shards import MANIFEST
from llmtrain.errors import UserError
from llmtrain.prep import manifest, python_docs
from llmtrain.prep.conversation_config import ConversationRecipe, ConversationSource
from llmtrain.prep.conversation_report import conversation_loader_yaml, print_conversations
from llmtrain.prep.conversation_sources import Read, read
from llmtrain.prep.in_place import hidden_until_complete
from llmtrain.prep.inputs import describe_inputs
from llmtrain.prep.local_work import LocalWork
from llmtrain.prep.mds import TextShardWriter
from llmtrain.prep.report import print_nothing_to_do
from llmtrain.prep.storage import is_remote
from llmtrain.progress import progress

_COLUMNS: Mapping[type, Mapping[str, Literal["str", "json"]]] = {
    Chat: {"messages": "json"},
    PromptResponse: {"prompt": "str", "response": "str"},
}


@dataclass
class SplitCounts:
    """What one split holds."""

    samples: int = 0
    """Conversations, or prompts with their responses."""
    turns: int = 0
    """Responses in them."""
    bytes: int = 0
    """UTF-8 bytes of all their texts."""
    response_bytes: int = 0
    """Those of the responses."""
    shard_bytes: int = 0
    """Size of the shards on disk."""


@dataclass
class SourceCounts:
    """What became of the rows of one source."""

    rows: int = 0
    """Rows read."""
    duplicates: int = 0
    """Rows that said exactly what an earlier one of any source had said: dropped."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Malformed rows by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """The first row of each reason, with what is wrong with it."""


def run(recipe: ConversationRecipe, console: Console) -> dict[str, Any]:
    """Make `recipe.out`, and return its manifest (`prep.json`).

    As for pretraining data: nothing appears before it is complete, the same recipe on the same inputs gives the same
    bytes, and a recipe that is carried out already is left alone.

    Raises:
        UserError: a source has a mistake, a split would be empty, `out` holds something else, or a row is malformed and
            the recipe says `strict: true`.
    """
    if is_remote(recipe.out):
        raise UserError(
            f"out: {recipe.out}: conversations are prepared on this machine; copy the folder there afterwards"
        )
    out = Path(recipe.out)
    inputs = {"sources": {source.name: _describe(source) for source in recipe.sources}}
    done = manifest.finished(recipe, inputs, LocalWork(out))
    if done is not None:
        print_nothing_to_do(console, out, done)
        return done
    start = time.monotonic()
    with hidden_until_complete(out) as partial:
        content = _make(recipe, partial, console)
        content["inputs"] = inputs
        (partial / MANIFEST).write_bytes(manifest.to_json(content))
    print_conversations(console, content, time.monotonic() - start)
    console.print(f"\n{out} is complete. For the training recipe:\n", highlight=False, soft_wrap=True)
    console.print(conversation_loader_yaml(recipe), highlight=False, markup=False, soft_wrap=True)
    return content


def _describe(source: ConversationSource) -> dict[str, Any]:
    if source.format == "auto":
        made_by = preprocessing.identity(source.preprocessing_fn, default_for=source.hf_name)
    else:
        made_by = f"{source.format} {python_docs.VERSION}"
    described = {**describe_inputs(source), "made_by": made_by}
    if source.hf_name is not None:  # files on this machine by their contents; what the hub has is asked for once
        asked = (source.hf_name, source.split, source.hf_kwargs, source.safe_load)
        described["identity"] = identity_of_dataset(*asked, ask_hub=False)
    return described


def _make(recipe: ConversationRecipe, folder: Path, console: Console) -> dict[str, Any]:
    writers: dict[str, _SplitWriter] = {}
    counts = {source.name: SourceCounts() for source in recipe.sources}
    seen: set[bytes] = set()
    with progress(console, "reading", None, "bytes") as advance:
        for source in recipe.sources:
            prefix = f"{source.name}/" if recipe.split_by_source else ""
            for split in recipe.splits_of(source):
                if prefix + split not in writers:
                    writers[prefix + split] = _SplitWriter(recipe, folder / prefix / split)
            for row in _good(recipe, source, counts[source.name], seen):
                advance(writers[prefix + _split_of(recipe, source, row.key)].write(row))
    for name, writer in writers.items():
        if not writer.counts.samples:
            told = "; ".join(_fate(source, counts[source]) for source in counts)
            raise UserError(f"{name} would be empty. {told}")
        writer.finish()
    return {
        "format": manifest.FORMAT,
        "task": recipe.task,
        "recipe": manifest.recipe_content(recipe),
        "splits": {name: asdict(writer.counts) for name, writer in writers.items()},
        "rows": {name: asdict(found) for name, found in counts.items()},
    }


def _good(
    recipe: ConversationRecipe, source: ConversationSource, counts: SourceCounts, seen: set[bytes]
) -> Iterator[Read]:
    """The rows of a source that are worth writing; the others are counted."""
    kept = 0
    for row in read(source):
        counts.rows += 1
        if isinstance(row.example, BadExample):
            if recipe.strict:
                raise UserError(f"source {source.name!r}: {row.place}: {row.example} (strict: true)")
            counts.dropped[row.example.reason] = counts.dropped.get(row.example.reason, 0) + 1
            counts.first.setdefault(row.example.reason, f"{row.place}: {row.example.detail}")
            continue
        digest = xxhash.xxh128_digest(json.dumps(asdict(row.example), sort_keys=True))
        if digest in seen:
            counts.duplicates += 1
            continue
        seen.add(digest)
        yield row
        kept += 1
        if kept == source.max_examples:
            return


def _split_of(recipe: ConversationRecipe, source: ConversationSource, key: str) -> str:
    """The split of an example: by what it asks alone, whatever its source, so that no question is in both."""
    if source.into is not None:
        return source.into
    return "val" if xxhash.xxh64_intdigest(key) < recipe.val_fraction * 2**64 else "train"


def _fate(name: str, counts: SourceCounts) -> str:
    worst = sorted(counts.dropped.items(), key=lambda item: -item[1])[:3]
    dropped = ", ".join(f"{n:,} {reason} ({counts.first[reason]})" for reason, n in worst)
    text = f"source {name!r}: {counts.rows:,} rows, {counts.duplicates:,} of them duplicates"
    return f"{text}, malformed: {dropped}" if dropped else text


class _SplitWriter:
    """Writes and counts one split; the first example decides on the columns."""

    def __init__(self, recipe: ConversationRecipe, folder: Path) -> None:
        self.counts = SplitCounts()
        self._recipe = recipe
        self._folder = folder
        self._kind: type | None = None
        self._shards: TextShardWriter | None = None

    def write(self, row: Read) -> int:
        """Add a row; returns the bytes of its text."""
        example = row.example
        if self._shards is None:
            self._kind = type(example)
            self._shards = TextShardWriter(
                self._folder,
                columns=_COLUMNS[self._kind],
                compression=self._recipe.compression,
                hashes=self._recipe.hashes,
                size_limit=self._recipe.size_limit,
                about={"task": self._recipe.task},
            )
        if not isinstance(example, Chat | PromptResponse) or type(example) is not self._kind:
            raise UserError(
                f"{row.place} is a {type(example).__name__}, and the rows before it were not: chats and prompts with "
                "responses cannot share shards. Set split_by_source: true, or bring one into the other's shape with "
                "preprocessing_fn"
            )
        if isinstance(example, Chat):
            self._shards.write({"messages": [asdict(message) for message in example.messages]})
            texts = [message.content for message in example.messages]
            responses = [message.content for message in example.messages if message.role == "assistant"]
        else:
            self._shards.write({"prompt": example.prompt, "response": example.response})
            texts, responses = [example.prompt, example.response], [example.response]
        n_bytes = sum(len(text.encode()) for text in texts)
        self.counts.samples += 1
        self.counts.turns += len(responses)
        self.counts.bytes += n_bytes
        self.counts.response_bytes += sum(len(text.encode()) for text in responses)
        return n_bytes

    def finish(self) -> None:
        """Write what is left and the index."""
        assert self._shards is not None
        self._shards.finish()
        self.counts.shard_bytes = self._shards.bytes_written
