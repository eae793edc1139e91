"""What a fine-tuning run trains: the first batch, decoded, and what became of the data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from llmtrain.data.finetuning.dataset import FinetuningDataset
from llmtrain.data.finetuning.loader import FinetuningLoader
from llmtrain.data.finetuning.online import StreamedExamples
from llmtrain.data.finetuning.online_loader import StreamingLoader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TRAINED, _CONTEXT = " train | ", "       | "
_STYLES = {_TRAINED: "green", _CONTEXT: "dim"}
_ROWS_IN_SHORT = 2
_SPAN_IN_SHORT = 80
_EXAMPLES_IN_SHORT = 3
_AROUND = 5


@dataclass(frozen=True)
class Counts:
    """What became of the data."""

    rows_read: int
    """Rows of all sources."""
    examples: int
    """Those that can be trained on."""
    dropped: dict[str, int]
    """Reason -> rows dropped for it."""
    tokens: int
    """Of all examples."""
    trained_tokens: int
    """Of these the targets."""
    rows: int
    """Rows of an epoch that the model gets (packed ones hold several examples)."""
    batches: int
    """Batches of an epoch."""
    padding: float
    """Share of an epoch's tokens that are padding."""
    efficiency: float | None
    """Packing: share of an epoch's tokens that are not padding; None without packing."""


@dataclass(frozen=True)
class Shown:
    """The picture of a batch. `str()` is for a screen, `full` for a file; rich prints it in colour."""

    counts: Counts | None
    """Numbers; None where nothing was counted ahead (`streaming: true`)."""
    full: str
    """The whole batch, with nothing left out."""
    lines: list[tuple[str, str]] = field(repr=False)
    """What `str()` shows: style and text of each line."""

    def __str__(self) -> str:
        return "\n".join(text for _, text in self.lines)

    def __rich__(self) -> Text:
        return Text("\n").join(Text(text, style=style) for style, text in self.lines)


def describe(loader: FinetuningLoader | StreamingLoader, tokenizer: "PreTrainedTokenizerFast") -> Shown:
    """Show the batch that comes next, without taking it.

    Args:
        loader: of `build_finetuning_loader`.
        tokenizer: the one it was built with.

    Returns:
        Each row's examples: where each comes from and its text, in lines that are marked where the model is trained
        to predict them; the tokens where that begins and ends; and the counts.
    """
    counts = count(loader) if isinstance(loader, FinetuningLoader) else None
    rows, batch = loader.next_batch()
    picture = _Picture(loader, tokenizer, rows, batch)
    closing = list(_streamed(loader) if counts is None else _summary(loader, counts))
    short = [*picture.lines(short=True), *closing]
    full = [*picture.lines(short=False), *closing]
    return Shown(counts, "\n".join(text for _, text in full), short)


def count(loader: FinetuningLoader) -> Counts:
    """Count the data of a loader and the padding of its next epoch."""
    dataset = loader.dataset
    reports = [store.report for store in dataset.stores]
    dropped: dict[str, int] = {}
    for report in reports:
        for reason, number in report.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + number
    plan = dataset.plan(dataset.upcoming()[0])
    used = np.add.reduceat(dataset.order.lengths[plan.examples], plan.starts[:-1])
    batches = [
        used[start : start + dataset.global_batch_size] for start in range(0, len(used), dataset.global_batch_size)
    ]
    laid_out = sum(len(rows) * loader.collate.width(int(rows.max())) for rows in batches)
    return Counts(
        rows_read=sum(report.rows for report in reports),
        examples=sum(report.examples for report in reports),
        dropped=dropped,
        tokens=sum(report.tokens for report in reports),
        trained_tokens=sum(report.trained_tokens for report in reports),
        rows=len(plan),
        batches=len(loader),
        padding=1 - float(used.sum()) / laid_out,
        efficiency=float(used.sum()) / laid_out if loader.collate.packed else None,
    )


class _Picture:
    """The lines of a batch."""

    def __init__(
        self,
        loader: FinetuningLoader | StreamingLoader,
        tokenizer: "PreTrainedTokenizerFast",
        rows: Sequence[Sequence[int] | NDArray[np.int64]],
        batch: dict[str, Any],
    ) -> None:
        self.dataset = loader.dataset
        self.tokenizer = tokenizer
        self.rows = rows
        self.width = int(batch["input_ids"].shape[1])

    def lines(self, *, short: bool) -> Iterator[tuple[str, str]]:
        yield (
            "bold",
            "The first batch: lines marked `train` are what the model learns to write, the others what it reads.",
        )
        yield "", "(⏎ is a line break in the text.)"
        for number, examples in enumerate(self.rows, 1):
            if short and number > _ROWS_IN_SHORT:
                yield "", f"... and {len(self.rows) - _ROWS_IN_SHORT} more rows like these"
                return
            yield from self._row(number, examples, short)

    def _row(self, number: int, examples: Sequence[int] | NDArray[np.int64], short: bool) -> Iterator[tuple[str, str]]:
        found = [self.dataset.example(int(example)) for example in examples]
        used, trained = sum(len(ids) for ids, _ in found), sum(int(mask.sum()) for _, mask in found)
        several = f"{len(examples)} examples" if len(examples) != 1 else "1 example"
        yield "", ""
        yield (
            "bold",
            f"Row {number} of {len(self.rows)}: {several}, {used:,} tokens ({trained:,} trained) "
            f"+ {self.width - used:,} padding = {self.width:,}",
        )
        for index, (example, (ids, mask)) in enumerate(zip(examples, found, strict=True), 1):
            if short and index > _EXAMPLES_IN_SHORT:
                yield "", f"  ... and {len(examples) - _EXAMPLES_IN_SHORT} more examples in this row"
                return
            place = self.dataset.place(int(example))
            yield "cyan", f"  Example {index}: {place} ({len(ids):,} tokens, {int(mask.sum()):,} trained)"
            yield from self._spans(ids, mask, short)
            if number == index == 1:
                yield from self._edges(ids, mask)

    def _spans(self, ids: NDArray[Any], mask: NDArray[np.bool_], short: bool) -> Iterator[tuple[str, str]]:
        start = 0
        for trained, group in groupby(mask.tolist()):
            stop = start + len(list(group))
            mark = _TRAINED if trained else _CONTEXT
            if short and stop - start > _SPAN_IN_SHORT:
                half = _SPAN_IN_SHORT // 2
                left_out = f" ... {stop - start - 2 * half:,} tokens ... "
                text = self._text(ids[start : start + half]) + left_out + self._text(ids[stop - half : stop])
            else:
                text = self._text(ids[start:stop])
            for line in text.replace("\n", "⏎\n").splitlines():
                yield _STYLES[mark], mark + line
            start = stop

    def _edges(self, ids: NDArray[Any], mask: NDArray[np.bool_]) -> Iterator[tuple[str, str]]:
        """The tokens where training begins and ends."""
        change = np.flatnonzero(np.diff(mask.astype(np.int8)))
        if len(change) == 0:
            return
        begin = int(change[0]) + 1
        end = int(change[1]) + 1 if len(change) > 1 else len(ids)
        yield "", "  Its tokens, where training begins and ends (> and <):"
        if end - begin <= 2 * _AROUND:
            shown = [*self._tokens(ids, begin - _AROUND, begin), ">", *self._tokens(ids, begin, end)]
        else:
            shown = [*self._tokens(ids, begin - _AROUND, begin), ">", *self._tokens(ids, begin, begin + _AROUND), "..."]
            shown += self._tokens(ids, end - _AROUND, end)
        yield "", "         " + " ".join([*shown, "<", *self._tokens(ids, end, end + 2)])

    def _tokens(self, ids: NDArray[Any], start: int, stop: int) -> list[str]:
        return [
            "'" + self._text(ids[n : n + 1]).replace("\n", "⏎") + "'" for n in range(max(start, 0), min(stop, len(ids)))
        ]

    def _text(self, ids: NDArray[Any]) -> str:
        text: str = self.tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text.replace("\r", "␍").replace("\x1b", "␛")


def _streamed(loader: Any) -> Iterator[tuple[str, str]]:
    data: StreamedExamples = loader.dataset
    yield "", ""
    yield "bold", "The data (tokenized while it is read, so nothing is counted yet)"
    for source, size, draw in zip(data.sources, data.sizes, data.draws, strict=True):
        yield "", f"  {source.describe()}: {size:,} rows; {draw:,} an epoch"


def _summary(loader: Any, counts: Counts) -> Iterator[tuple[str, str]]:
    dataset: FinetuningDataset = loader.dataset
    yield "", ""
    yield "bold", "The data"
    for store, draw in zip(dataset.stores, dataset.order.draws, strict=True):
        report = store.report
        times = "" if draw == report.examples else f"; {draw:,} an epoch ({draw / report.examples:.2g} times)"
        yield "", f"  {report.source}: {report.rows:,} rows read, {report.examples:,} examples{times}"
        for line in report.reasons().splitlines():
            yield "yellow", f"    dropped: {line}"
        for what, number in report.noticed.items():
            yield "yellow", f"    noticed: {number:,} x {what}"
    share = counts.trained_tokens / counts.tokens
    yield "", f"  {counts.tokens:,} tokens, {counts.trained_tokens:,} of them trained ({share:.1%})"
    rows = f"  An epoch: {counts.rows:,} rows of {dataset.order.seq_len:,} tokens, {counts.batches:,} batches; "
    if counts.efficiency is None:
        longest = "" if counts.padding < 0.2 else " (packing: true would fill the rows)"
        yield "", f"{rows}{counts.padding:.1%} padding{longest}"
    else:
        unpacked = sum(dataset.order.draws) * dataset.order.seq_len
        alone = float(dataset.order.lengths.mean()) * sum(dataset.order.draws) / unpacked
        yield "", f"{rows}packing fills {counts.efficiency:.1%} of them (without packing: {alone:.1%})"
