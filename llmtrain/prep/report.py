"""What is printed at the beginning and at the end: code to be run, totals, and the loader's YAML, ready to paste."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.merge import Merged
from llmtrain.prep.mixture import NAME as MIXTURE
from llmtrain.prep.mixture import mixture_yaml, streams_of
from llmtrain.prep.plan import Plan
from llmtrain.prep.readers import BadInput
from llmtrain.prep.split import SplitCounts
from llmtrain.prep.stages.config import Language, UserFunction
from llmtrain.prep.storage import is_remote
from llmtrain.redaction import without_password


def print_nothing_to_do(console: Console, out: str | Path, done: Mapping[str, Any]) -> None:
    """The one line of a run that finds its work done."""
    rows = ", ".join(f"{name} {counts['samples']:,} rows" for name, counts in done["splits"].items())
    line = f"{out} is complete ({rows}): same recipe, same inputs, nothing to do"
    console.print(line, highlight=False, soft_wrap=True)


def print_new_weights(console: Console, recipe: PrepRecipe) -> None:
    """Of a run that finds the shards complete, and other weights in the recipe than before."""
    line = f"{recipe.out} is complete; {MIXTURE} has the weights of the recipe now. For the training recipe:\n"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(loader_yaml(recipe), highlight=False, markup=False, soft_wrap=True)


def print_functions(console: Console, recipe: PrepRecipe) -> None:
    """Before anything of it is imported: the Python code that a recipe has run."""
    for stage in recipe.stages:
        if isinstance(stage, Language | UserFunction):
            line = f"stage {stage.name} runs {stage.function}, as the recipe says"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_plan(console: Console, recipe: PrepRecipe, plan: Plan) -> None:
    """What there is to do, one line a source."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source", no_wrap=True)
    for column in ("partitions", "files", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, source in enumerate(recipe.sources):
        mine = [partition for partition in plan.partitions if partition.source == number]
        files = {file.path for partition in mine for piece in partition.pieces for file in piece.files}
        size = sum(partition.size for partition in mine)
        table.add_row(source.name, f"{len(mine):,}", f"{len(files):,}", f"{size / 1e6:,.2f}")
    console.print(table)
    console.print(f"planned: {len(plan.partitions):,} partitions, numbered from 0", highlight=False)


def print_made(console: Console, recipe: PrepRecipe, merged: Merged, seconds: float) -> None:
    """What was made, what was left out, and how to train on it."""
    print_totals(console, merged.splits, seconds)
    _print_bad_input(console, merged.bad_input)
    if recipe.stages:
        from llmtrain.prep.stages import print_stage_report

        print_stage_report(console, merged.content)
    if merged.content["hard_cuts"]:
        cuts = f"{merged.content['hard_cuts']:,} cuts in long documents"
        line = f"{cuts}, without a place to cut for 2 million characters: ids may differ there"
        console.print(line, highlight=False, soft_wrap=True)
    mixture = ""
    if mixture_yaml(recipe) is not None:
        mixture = f" {recipe.out}/{MIXTURE} has the training streams, too: streams: {recipe.out}/{MIXTURE}."
    line = f"\n{recipe.out} is complete.{mixture} For the training recipe:\n"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(loader_yaml(recipe), highlight=False, markup=False, soft_wrap=True)  # last: it can be cut off there


def _print_bad_input(console: Console, bad: BadInput) -> None:
    lines = []
    if bad.counts:
        lines.append(f"left out: {bad.counts:,} rows or files that could not be read")
        lines += [f"  {place}: {reason}" for place, reason in bad.first]
        lines += ["  ..."] * (bad.counts > len(bad.first))
    if bad.empty:
        lines.append(f"{bad.empty:,} empty documents or files, the first: {bad.first_empty[0]}")
    for line in lines:
        line = line.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_totals(console: Console, splits: Mapping[str, SplitCounts], seconds: float) -> None:
    """A table, one line a split."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("split", no_wrap=True)
    for column in ("documents", "tokens", "text MB", "bytes/token", "rows", "shard MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, counts in splits.items():
        table.add_row(
            name,
            f"{counts.documents:,}",
            f"{counts.tokens:,}",
            f"{counts.bytes / 1e6:,.2f}",
            f"{counts.bytes / max(1, counts.tokens):.2f}",
            f"{counts.samples:,}",
            f"{counts.shard_bytes / 1e6:,.2f}",
        )
    console.print(table)
    short, fill_none, lost, twice = (
        sum(getattr(counts, key) for counts in splits.values())
        for key in ("dropped_documents", "short_documents", "dropped_tokens", "repeated_tokens")
    )
    parts = [f"{short:,} documents below min_document_tokens", f"{lost:,} tokens that fill no row"]
    if fill_none:
        parts[1] += f" ({fill_none:,} documents have fewer than a row)"
    console.print(f"dropped: {', '.join(parts)}", highlight=False)
    if twice:
        console.print(f"repeated: {twice:,} tokens, in rows that end where a document ends", highlight=False)
    total = sum(counts.bytes for counts in splits.values())
    console.print(f"{total / 1e6:,.2f} MB of text in {seconds:.1f} s", highlight=False)


def loader_yaml(recipe: PrepRecipe) -> str:
    """`train_loader` and `eval_loader` for a training recipe."""
    lines = [*_loader(recipe, "train_loader", "train", shuffle=True)]
    if recipe.has_validation():
        lines += _loader(recipe, "eval_loader", "val", shuffle=False)
    if recipe.tokenizer.train is not None:
        copy = f"tokenizer  # a copy of {without_password(recipe.out)}/tokenizer on this machine"
        lines += ["tokenizer:", f"  name: {copy if is_remote(recipe.out) else f'{recipe.out}/tokenizer'}"]
    elif recipe.tokenizer.name is not None:
        lines += ["tokenizer:", f"  name: {recipe.tokenizer.name}"]
    return "\n".join(lines) + "\n"


def _loader(recipe: PrepRecipe, key: str, split: str, *, shuffle: bool) -> list[str]:
    lines = [f"{key}:", "  name: text", "  dataset:"]
    if recipe.split_by_source:
        streams = yaml.safe_dump({"streams": streams_of(recipe, split)}, sort_keys=False)
        lines += textwrap.indent(streams.rstrip(), "    ").splitlines()
        if split == "train" and recipe.sources[0].proportion is not None:
            lines.append("    batching_method: stratified")
    else:
        place = "remote" if is_remote(recipe.out) else "local"
        lines.append(f"    {place}: {recipe.out}/{split}")
    lines += [f"    shuffle: {str(shuffle).lower()}", f"    max_seq_len: {recipe.max_seq_len}"]
    return [*lines, f"  drop_last: {str(shuffle).lower()}"]
