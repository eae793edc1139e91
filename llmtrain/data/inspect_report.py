"""What `llmtrain data inspect` prints."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.data.inspect_counts import Vocabulary
from llmtrain.data.inspect_folder import Contents, Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

_BAR = 40
_FREQUENT = 12
_WIDE = 200  # tables in files and narrow windows keep their columns


def print_origin(console: Console, place: Path, made: Mapping[str, Any]) -> None:
    """What made the shards, from `prep.json`."""
    recipe = made.get("recipe") or {}
    inputs = (made.get("inputs") or {}).get("sources") or {}
    tokenizer = recipe.get("tokenizer") or {}
    console.print(f"{place / 'prep.json'}: made by llmtrain prep", soft_wrap=True, markup=False)
    if tokenizer:
        trained = tokenizer.get("train") or {}
        name = tokenizer.get("name") or f"trained here ({trained.get('vocab_size'):,} ids)"
        console.print(f"  tokenizer {name}, fingerprint {str(made.get('tokenizer_fingerprint'))[:12]}", markup=False)
    said = [f"{key} {recipe[key]}" for key in ("max_seq_len", "cut", "val_fraction", "compression") if recipe.get(key)]
    console.print(f"  {', '.join(said)}", markup=False)
    for source in recipe.get("sources") or []:
        found = inputs.get(source.get("name")) or {}
        known = [f"{found[key]:,} {key}" for key in ("files", "bytes") if isinstance(found.get(key), int)]
        where = source.get("hf_name") or ", ".join(source.get("files") or [])
        caps = [f"{key} {source[key]:,}" for key in ("max_documents", "max_bytes") if source.get(key)]
        line = f"  source {source.get('name')}: {'; '.join([where, *known, *caps])}"
        console.print(line, soft_wrap=True, markup=False)
    for name, counts in (made.get("splits") or {}).items():
        numbers = ", ".join(
            f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items() if isinstance(value, int) and value
        )
        console.print(f"  {name}: {numbers}", soft_wrap=True, markup=False)
    _print_what_happened(console, made)
    console.print()


def _print_what_happened(console: Console, made: Mapping[str, Any]) -> None:
    """What the stages dropped, and what could not be read."""
    for stage in made.get("stages") or []:
        line = (
            f"  stage {stage['name']}: {stage['seen']:,} documents seen, {stage['dropped']:,} dropped "
            f"({stage['dropped_bytes'] / 1e6:,.2f} MB), {stage['changed']:,} changed"
        )
        console.print(line, soft_wrap=True, markup=False)
    bad = made.get("bad_input") or {}
    if bad.get("bad"):
        place, reason = bad["first_bad"][0]
        console.print(
            f"  {bad['bad']:,} rows or files could not be read; the first: {place}: {reason}",
            soft_wrap=True,
            markup=False,
        )
    if made.get("hard_cuts"):
        console.print(f"  {made['hard_cuts']:,} places where a document was cut within a word", markup=False)


def print_tokens(console: Console, found: Sequence[Contents], vocab_size: int | None) -> None:
    """A line for each folder of tokens."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("folder", no_wrap=True)
    for column in ("shards", "rows", "row", "tokens", "MB", "bytes/token", "ids used", "EOS", "entropy"):
        table.add_column(column, justify="right", no_wrap=True)
    for contents in found:
        words = contents.vocabulary
        size = vocab_size or contents.about.get("vocab_size")
        rows = contents.row_lengths
        table.add_row(
            contents.name,
            f"{contents.checked.shards:,}",
            f"{contents.rows:,}",
            f"{rows.most:,}" if rows.least == rows.most else f"{rows.least:,}-{rows.most:,}",
            f"{words.total:,}",
            f"{contents.checked.bytes / 1e6:,.2f}",
            f"{contents.checked.bytes / max(1, words.total):.2f}",
            f"{words.occurring:,}" + (f" of {size:,} ({100 * words.occurring / size:.1f}%)" if size else ""),
            "?" if contents.eos is None else f"{100 * words.share(contents.eos):.3f}%",
            f"{words.entropy:.3f} nats",
        )
    _print_wide(console, table)
    for contents in found:
        encoding = contents.encodings.get("tokens")
        packed = contents.compression or "not compressed"
        note = f"{contents.name}: tokens {encoding}, {packed}, {contents.raw_bytes / 1e6:,.2f} MB unpacked"
        console.print(note, soft_wrap=True, markup=False)
    if len(found) > 1:
        together = Vocabulary()
        for contents in found:
            together.merge(contents.vocabulary)
        share = f" of {vocab_size:,} ({100 * together.occurring / vocab_size:.1f}%)" if vocab_size else ""
        console.print(f"all together: {together.total:,} tokens, {together.occurring:,} ids{share} occur", markup=False)
    console.print()


def _print_wide(console: Console, table: Table) -> None:
    width = console.width
    console.width = max(width, _WIDE)
    try:
        console.print(table, soft_wrap=True)
    finally:
        console.width = width


def print_frequent(console: Console, words: Vocabulary, tokenizer: "Tokenizer | None") -> None:
    """The most frequent tokens with their share."""
    shown = []
    for token, count in words.most_frequent(_FREQUENT):
        name = str(token) if tokenizer is None else f"{token} {_one(tokenizer, token)}"
        shown.append(f"{name} {100 * count / words.total:.2f}%")
    console.print("most frequent ids: " + ", ".join(shown), soft_wrap=True, markup=False)
    console.print()


def print_text(console: Console, found: Sequence[Contents]) -> None:
    """A line for each folder of text."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("folder", no_wrap=True)
    for column in ("shards", "rows", "columns", "text MB", "shard MB", "mean bytes", "longest"):
        table.add_column(column, justify="right", no_wrap=True)
    for contents in found:
        table.add_row(
            contents.name,
            f"{contents.checked.shards:,}",
            f"{contents.rows:,}",
            ", ".join(f"{name}: {encoding}" for name, encoding in contents.encodings.items()),
            f"{contents.row_lengths.total / 1e6:,.2f}",
            f"{contents.checked.bytes / 1e6:,.2f}",
            f"{contents.row_lengths.mean:,.0f}",
            f"{contents.row_lengths.most:,}",
        )
    _print_wide(console, table)
    console.print()


def print_lengths(console: Console, contents: Contents) -> None:
    """A histogram by doublings, or one line where all are the same."""
    what, lengths = contents.lengths
    unit = "tokens, EOS included" if what == "documents" else "tokens" if contents.kind == "tokens" else "bytes"
    if not lengths.n:
        return
    if lengths.least == lengths.most:
        why = "" if contents.kind == "text" else ": documents cannot be told apart"
        console.print(f"{contents.name}: all rows have {lengths.most:,} {unit}{why}\n", markup=False)
        return
    quantiles = ", ".join(
        f"{round(100 * share)}% {lengths.quantile(share):,}" for share in (0.05, 0.25, 0.5, 0.75, 0.95)
    )
    console.print(
        f"{contents.name}: {lengths.n:,} {what} of {lengths.least:,} to {lengths.most:,} {unit}; "
        f"mean {lengths.mean:,.0f}; up to: {quantiles}",
        soft_wrap=True,
        markup=False,
    )
    edges, counts = lengths.histogram(1)
    width = max(len(f"{edge:,}") for edge in edges)
    for first, last, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * int(np.ceil(_BAR * count / max(counts)))
        console.print(f"  {first:>{width},} - {last - 1:>{width},}  {count:>13,}  {bar}", markup=False)
    if contents.documents is not None and contents.documents.cut:
        console.print(
            f"  and {contents.documents.cut:,} that are cut by the end of the shards, or of a partition", markup=False
        )
    console.print()


def print_samples(console: Console, contents: Contents, tokenizer: "Tokenizer | None", most: int) -> None:
    """Some rows, decoded, with special tokens visible."""
    for sample in contents.samples:
        title = f"--- {contents.name}, {sample.shard}, row {sample.row}"
        if sample.ids is not None and len(sample.ids) > most:
            title += f": first {most:,} of {len(sample.ids):,} tokens"
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(_shown(sample, tokenizer, most), soft_wrap=True)
    if contents.samples:
        console.print()


def _shown(sample: Sample, tokenizer: "Tokenizer | None", most: int) -> Text:
    if sample.ids is not None:
        if tokenizer is None:
            return Text(" ".join(map(str, sample.ids[:most].tolist())))
        return decoded(sample.ids[:most], tokenizer)
    shown = Text()
    for column, value in sample.texts.items():
        turns = value if isinstance(value, list) else [value]
        for turn in turns:
            said = isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
            label = str(turn.get("role", column)) if said else column
            text = turn["content"] if said else turn if isinstance(turn, str) else json.dumps(turn, ensure_ascii=False)
            shown.append(f"{label}: ", style="bold")
            shown.append(visible(text[: 6 * most]) + (" ..." if len(text) > 6 * most else "") + "\n")
    return shown


def decoded(ids: "NDArray[Any]", tokenizer: "Tokenizer") -> Text:
    """Tokens as text; special ones stand out (on a terminal), also from text that spells them."""
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    shown = Text()
    waiting: list[int] = []
    for token in [*ids.tolist(), None]:
        if token is not None and token not in special:
            waiting.append(token)
            continue
        if waiting:
            shown.append(visible(tokenizer.decode(waiting, skip_special_tokens=False)))
            waiting = []
        if token is not None:
            shown.append(visible(tokenizer.id_to_token(token) or str(token)), style="reverse")
    return shown


def visible(text: str) -> str:
    """Text whose control characters (but line breaks and tabs) are spelled: a corpus must not control a terminal."""
    return "".join(
        character if character in "\n\t" or character.isprintable() or character == "\u00a0" else _spelled(character)
        for character in text
    )


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _one(tokenizer: "Tokenizer", token: int) -> str:
    text = tokenizer.decode([token], skip_special_tokens=False)
    return json.dumps(visible(text), ensure_ascii=False) if text else str(tokenizer.id_to_token(token))


def as_dict(contents: Contents, vocab_size: int | None) -> dict[str, Any]:
    """For JSON."""
    checked = contents.checked
    what, lengths = contents.lengths
    content: dict[str, Any] = {
        "folder": str(checked.folder),
        "shards": checked.shards,
        "rows": contents.rows,
        "bytes": checked.bytes,
        "raw_bytes": contents.raw_bytes,
        "compression": contents.compression,
        "columns": contents.encodings,
        "hashes": sorted(checked.hashes),
        "damaged": [{"file": name, "what": what} for name, what in checked.damages],
        "lengths": {"of": what, "unit": "tokens" if contents.kind == "tokens" else "bytes", **lengths.as_dict()},
    }
    if contents.kind == "tokens":
        words = contents.vocabulary
        content |= {
            "tokens": words.total,
            "vocab_size": vocab_size or contents.about.get("vocab_size"),
            "ids_used": words.occurring,
            "eos_token_id": contents.eos,
            "eos_share": words.share(contents.eos),
            "unigram_entropy_nats": words.entropy,
            "most_frequent": [{"id": token, "count": count} for token, count in words.most_frequent(100)],
        }
        if contents.documents is not None:
            content["documents_cut"] = contents.documents.cut
    return content
