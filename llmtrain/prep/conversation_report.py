"""What is printed at the end of the preparation of conversations."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from llmtrain.prep.conversation_config import ConversationRecipe


def print_conversations(console: Console, content: Mapping[str, Any], seconds: float) -> None:
    """A table, one line a split, and what was dropped from each source.

    Args:
        console: where to.
        content: the manifest.
        seconds: that it took.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("split", no_wrap=True)
    for column in ("conversations", "responses", "text MB", "of it responses", "shard MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, counts in content["splits"].items():
        table.add_row(
            name,
            f"{counts['samples']:,}",
            f"{counts['turns']:,}",
            f"{counts['bytes'] / 1e6:,.2f}",
            f"{counts['response_bytes'] / 1e6:,.2f}",
            f"{counts['shard_bytes'] / 1e6:,.2f}",
        )
    console.print(table)
    for name, counts in content["rows"].items():
        line = f"{name}: {counts['rows']:,} rows read, {counts['duplicates']:,} duplicates dropped"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        for reason, n in sorted(counts["dropped"].items(), key=lambda item: -item[1]):
            line = f"  {n:,} dropped: {reason} (first: {counts['first'][reason]})"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"in {seconds:.1f} s", highlight=False)


def conversation_loader_yaml(recipe: ConversationRecipe) -> str:
    """`train_loader` and `eval_loader` for a training recipe."""
    splits = {split for source in recipe.sources for split in recipe.splits_of(source)}
    lines = _loader(recipe, "train_loader", "train") if "train" in splits else []
    return "\n".join([*lines, *(_loader(recipe, "eval_loader", "val") if "val" in splits else [])]) + "\n"


def _loader(recipe: ConversationRecipe, key: str, split: str) -> list[str]:
    training = split == "train"
    lines = [f"{key}:", "  name: finetuning", "  dataset:"]
    if recipe.split_by_source:
        lines.append("    streams:")
        for source in recipe.sources:
            if split not in recipe.splits_of(source):
                continue
            lines += [f"      {source.name}:", f"        local: {recipe.out}/{source.name}/{split}"]
            for name in ("proportion", "repeat") if training else ():
                if (weight := getattr(source, name)) is not None:
                    lines.append(f"        {name}: {weight:g}")
    else:
        lines.append(f"    local: {recipe.out}/{split}")
    lines += [f"    shuffle: {str(training).lower()}", "    packing: true"]
    return [*lines, f"  drop_last: {str(training).lower()}"]
