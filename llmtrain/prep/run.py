"""`llmtrain prep`: a data recipe carried out, from sources to shards."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from rich.console import Console

from llmtrain.config.base import Config
from llmtrain.config.load import load
from llmtrain.errors import UserError
from llmtrain.prep import manifest
from llmtrain.prep.config import PrepRecipe, SourceConfig
from llmtrain.prep.conversation_config import ConversationRecipe
from llmtrain.prep.encode import Encoder, batches, open_encoder
from llmtrain.prep.in_place import hidden_until_complete
from llmtrain.prep.mds import ShardWriter, token_dtype
from llmtrain.prep.pack import Cutter, DocumentCutter, Packer
from llmtrain.prep.progress import progress
from llmtrain.prep.report import loader_yaml, print_nothing_to_do, print_totals
from llmtrain.prep.sources import Document, documents, files_of
from llmtrain.prep.split import SplitCounts, SplitWriter, is_validation
from llmtrain.prep.train_tokenizer import train_tokenizer
from llmtrain.tokenizer import fingerprint


def prepare(recipe_file: Path, overrides: Sequence[str] = ()) -> None:
    """Carry out a data recipe; prints progress, totals, and the loader's YAML.

    Raises:
        UserError: the recipe, a source or the tokenizer has a mistake, or `out` holds something else.
    """
    recipe = load_recipe(recipe_file, overrides)
    if isinstance(recipe, ConversationRecipe):
        from llmtrain.prep.conversations import run as run_conversations

        run_conversations(recipe, Console())
    else:
        run(recipe, Console())


def load_recipe(recipe_file: Path, overrides: Sequence[str] = ()) -> PrepRecipe | ConversationRecipe:
    """Read a data recipe; its `task` decides what the other keys may be.

    Raises:
        ConfigError: with every mistake that was found.
    """
    task = load(recipe_file, _Task, overrides).task
    if task == "finetuning":
        return load(recipe_file, ConversationRecipe, overrides)
    return load(recipe_file, PrepRecipe, overrides)


class _Task(Config):
    """The one key that decides what the others may be."""

    model_config = ConfigDict(extra="ignore")

    task: Literal["pretraining", "finetuning"] = "pretraining"
    """What the shards are for."""


def run(recipe: PrepRecipe, console: Console) -> dict[str, Any]:
    """Make `recipe.out`, and return its manifest (`prep.json`).

    Everything is written to a hidden folder beside `out` and renamed when it is complete, so that an interrupted run
    leaves nothing that looks like data. The same recipe on the same inputs gives the same bytes; done already, it says
    so and does nothing.

    Raises:
        UserError: see `prepare`.
    """
    out = Path(recipe.out)
    inputs = manifest.inputs_content(recipe)
    done = manifest.finished(recipe, inputs)
    if done is not None:
        print_nothing_to_do(console, out, done)
        return done
    start = time.monotonic()
    with hidden_until_complete(out) as partial:
        content, splits = _make(recipe, partial, console)
        content["inputs"] = inputs
        manifest.write(partial, content)
    print_totals(console, splits, time.monotonic() - start)
    console.print(f"\n{out} is complete. For the training recipe:\n", highlight=False, soft_wrap=True)
    console.print(loader_yaml(recipe), highlight=False, markup=False, soft_wrap=True)
    return content


def _make(recipe: PrepRecipe, folder: Path, console: Console) -> tuple[dict[str, Any], dict[str, SplitCounts]]:
    if recipe.tokenizer.train is not None:
        name = str(folder / "tokenizer")
        _train_tokenizer(recipe, Path(name), console)
    else:
        assert recipe.tokenizer.name is not None
        name = recipe.tokenizer.name
    encoder = open_encoder(name, eos=recipe.eos, bos=recipe.bos)
    facts = {
        "tokenizer_fingerprint": fingerprint(name),
        "vocab_size": encoder.vocab_size,
        "eos_token_id": encoder.eos,
        "bos_token_id": encoder.bos,
        "max_seq_len": recipe.max_seq_len,
        "cut": recipe.cut,
    }
    writers: dict[str, SplitWriter] = {}
    with progress(console, "tokenizing", _bytes_to_read(recipe)) as advance:
        for source in recipe.sources:
            prefix = f"{source.name}/" if recipe.split_by_source else ""
            for split in recipe.splits_of(source):
                if prefix + split not in writers:
                    writers[prefix + split] = _writer(recipe, folder / prefix / split, encoder, facts)
            number = 0
            for batch in batches(documents(source)):
                held_out = [_is_held_out(recipe, source, number + i) for i in range(len(batch))]
                number += len(batch)
                _write_batch(batch, held_out, encoder, recipe.min_document_tokens, writers, prefix)
                advance(sum(document.n_bytes for document in batch))
    splits = {name: writer.finish() for name, writer in writers.items()}
    for split, counts in splits.items():
        if counts.samples == 0:
            short = f" ({counts.dropped_documents:,} more are below min_document_tokens)" * bool(
                counts.dropped_documents
            )
            raise UserError(
                f"{split} would be empty: {counts.documents:,} documents with {counts.tokens:,} tokens{short} fill no "
                f"row of {recipe.max_seq_len}. More text, another val_fraction, or a shorter max_seq_len is needed"
            )
    content = {
        "format": manifest.FORMAT,
        "recipe": manifest.recipe_content(recipe),
        **facts,
        "splits": {split: counts.as_dict() for split, counts in splits.items()},
    }
    return content, splits


def _writer(recipe: PrepRecipe, folder: Path, encoder: Encoder, facts: dict[str, Any]) -> SplitWriter:
    dtype = token_dtype(encoder.vocab_size)
    shards = ShardWriter(
        folder,
        seq_len=recipe.max_seq_len,
        dtype=dtype,
        compression=recipe.compression,
        hashes=recipe.hashes,
        size_limit=recipe.size_limit,
        about=facts,
    )
    cutter: Cutter = Packer(recipe.max_seq_len, dtype)
    if recipe.cut == "documents":
        cutter = DocumentCutter(recipe.max_seq_len, dtype, overlap=recipe.tail == "overlap")
    return SplitWriter(shards, cutter, encoder.vocab_size)


def _is_held_out(recipe: PrepRecipe, source: SourceConfig, number: int) -> bool:
    if source.into is not None:
        return source.into == "val"
    return is_validation(source.name, number, recipe.val_fraction)


def _write_batch(
    batch: list[Document],
    held_out: list[bool],
    encoder: Encoder,
    min_document_tokens: int,
    writers: dict[str, SplitWriter],
    prefix: str,
) -> None:
    ids = encoder.encode(batch)
    for split, wanted in (("train", False), ("val", True)):
        mine = [i for i, held in enumerate(held_out) if held == wanted]
        kept = [i for i in mine if len(ids[i]) >= min_document_tokens]
        if mine:
            writers[prefix + split].add(
                *encoder.frame([ids[i] for i in kept]),
                n_bytes=sum(batch[i].n_bytes for i in kept),
                dropped=len(mine) - len(kept),
            )


def _train_tokenizer(recipe: PrepRecipe, folder: Path, console: Console) -> None:
    cfg = recipe.tokenizer.train
    assert cfg is not None
    per_source = cfg.max_bytes // len(recipe.sources)

    def sample() -> Iterator[str]:
        for source in recipe.sources:
            left = per_source
            for number, document in enumerate(documents(source)):
                if _is_held_out(recipe, source, number):
                    continue
                yield document.text[:left]
                left -= document.n_bytes
                if left <= 0:
                    break

    start = time.monotonic()
    console.print(f"training a tokenizer of {cfg.vocab_size:,} tokens ...", highlight=False)
    train_tokenizer(sample(), cfg, folder)
    console.print(f"trained in {time.monotonic() - start:.1f} s", highlight=False)


def _bytes_to_read(recipe: PrepRecipe) -> int | None:
    """How much text there is, for the time left; None when that cannot be known beforehand."""
    total = 0
    for source in recipe.sources:
        if source.max_bytes is not None:
            known = source.max_bytes
        elif source.files is None or source.max_documents is not None:
            return None
        else:
            known = 1 << 62
        if source.files is not None:
            files = files_of(source)
            if any(path.suffix in {".gz", ".zst", ".parquet"} for path in files):
                return None
            known = min(known, sum(path.stat().st_size for path in files))
        total += known
    return total
