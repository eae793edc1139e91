"""Sources become stores: tokenized once, found again by every later run."""

import errno
import glob
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import xxhash
from rich.console import Console

from llmtrain.conversations.messages import BadExample, Chat, Example
from llmtrain.data.finetuning.local_ranks import from_leader, gather, made_by_leader
from llmtrain.data.finetuning.progress import counted
from llmtrain.data.finetuning.sources import Source
from llmtrain.data.finetuning.store import DamagedStore, ExampleStore, StoreWriter, work_prefix
from llmtrain.data.finetuning.tokenize_many import Placed, Tokenizes, tokenized
from llmtrain.errors import UserError
from llmtrain.file_lock import one_at_a_time

log = logging.getLogger(__name__)

_LAYOUT = 2
"""Part of every key: goes up when stores, or how rows become examples, change."""
_CHECKED = 64
"""Examples whose rendering and masking are compared before the rest is tokenized."""


def prepare(
    open_sources: Callable[[], list[Source]],
    tokenize: Tokenizes,
    *,
    cache: Path,
    vocab_size: int,
    strict: bool,
    check: Callable[[Sequence[Example]], Sequence[str]] | None = None,
) -> list[ExampleStore]:
    """Find or make the store of each source (a collective call: the first rank of each machine works).

    Args:
        open_sources: called on that rank alone.
        tokenize: makes ids and masks of examples.
        cache: folder of all stores.
        vocab_size: ids of the model.
        strict: the first row that nothing can be learnt from is an error.
        check: called with the first examples before the rest is tokenized; its warnings are logged.

    Raises:
        UserError: on all ranks: a source cannot be read, has nothing to train on, or does not fit the model.
    """
    sources: list[Source] = []

    def keys() -> list[tuple[str, str]]:
        sources.extend(open_sources())
        named = [(_key(source, tokenize), source.describe()) for source in sources]
        for key, _ in named:
            _remove_damaged(cache / key)
        return named

    found = from_leader(keys)
    folders = [cache / key for key, _ in found]

    def make() -> None:
        with _writing_to(cache):
            make_each()

    def make_each() -> None:
        for source, folder in zip(sources, folders, strict=True):
            if folder.is_dir():
                log.info("%s: tokenized before, in %s", source.describe(), folder)
                continue
            waits = partial(log.warning, "%s: another run tokenizes it; waiting for it to finish", source.describe())
            with one_at_a_time(folder.parent / f".{folder.name}.lock", waits, nap=0.5):
                if not folder.is_dir():
                    # Of a run that was killed; other machines may be at work beside this one, where locks are local.
                    for left in folder.parent.glob(f"{glob.escape(work_prefix(folder))}*.tmp"):
                        shutil.rmtree(left, ignore_errors=True)
                    _tokenize(source, tokenize, folder, vocab_size, strict, check)

    made_by_leader(folders, make)
    stores = [ExampleStore(folder) for folder in folders]
    for store, (_, description) in zip(stores, found, strict=True):
        store.report.source = description  # the same data may have been tokenized under another name
        _check(store, vocab_size, strict)  # on all ranks: one that failed alone would leave the others waiting
    _agree(stores)
    return stores


def _remove_damaged(folder: Path) -> None:
    """Take away a store that cannot be used, so that it is made again."""
    if not folder.is_dir():
        return
    try:
        ExampleStore(folder)
    except DamagedStore as problem:
        log.warning("%s: its examples are tokenized again", problem)
        with _writing_to(folder.parent):
            away = folder.with_name(f".{folder.name}.damaged.tmp")
            shutil.rmtree(away, ignore_errors=True)
            folder.rename(away)
            shutil.rmtree(away, ignore_errors=True)


@contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    """A full disk and a folder that cannot be written are for the user to mend."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(
            f"the tokenized examples cannot be kept in {cache}: {problem.strerror}. Make room there, or name another "
            "folder with dataset.cache_dir"
        ) from problem


def _key(source: Source, tokenize: Tokenizes) -> str:
    return str(xxhash.xxh128_hexdigest(json.dumps([_LAYOUT, source.identity, tokenize.identity()])))


def _tokenize(
    source: Source,
    tokenize: Tokenizes,
    folder: Path,
    vocab_size: int,
    strict: bool,
    check: Callable[[Sequence[Example]], Sequence[str]] | None,
) -> None:
    console = Console(stderr=True)
    noticed: Counter[str] = Counter()
    with (
        StoreWriter(folder, vocab_size=vocab_size, source=source.describe()) as store,
        counted(console, f"tokenizing {source.describe()}", source.rough_rows()) as done,
    ):
        for batch, results, counts in tokenized(_checked(source, check), tokenize):
            remaining = iter(results)
            for place, example in batch:
                result = example if isinstance(example, BadExample) else next(remaining)
                if not isinstance(result, BadExample):
                    store.add(result.ids, result.trained, place)
                elif strict:
                    raise UserError(
                        f"{place}: {result}. Mend or remove the row, or leave out strict: true: such rows are then "
                        "dropped and counted"
                    )
                else:
                    store.drop(result, place)
            noticed += counts
            done(len(batch))
        store.report.noticed = dict(noticed)
        if store.report.examples == 0:
            raise UserError(_nothing_left(store))


def _nothing_left(store: StoreWriter) -> str:
    report = store.finished_report()
    if report.rows == 0:
        return f"{report.source}: there is nothing to train on: it has no rows"
    return f"{report.source}: there is nothing to train on: all {report.rows:,} rows were dropped\n{report.reasons()}"


def _check(store: ExampleStore, vocab_size: int, strict: bool) -> None:
    """What may be another recipe's fault than that of the one the store was made for."""
    report = store.report
    if report.largest_id >= vocab_size:
        raise UserError(
            f"{report.source}: token id {report.largest_id} is outside of the model's vocabulary of {vocab_size}. "
            "Was it tokenized with another tokenizer?"
        )
    if strict and report.dropped:
        raise UserError(
            f"{report.source}: strict: true, and nothing can be learnt from these rows:\n{report.reasons()}"
        )


def _agree(stores: Sequence[ExampleStore]) -> None:
    """All machines must have made the same of the data: ranks take their rows from one order."""
    mine = [(store.folder.name, len(store), store.report.tokens, store.report.trained_tokens) for store in stores]
    for rank, theirs in enumerate(gather(mine)):
        if theirs != mine:
            raise UserError(
                f"the examples of rank {rank}'s machine are others than this one's ({theirs} against {mine}): do they "
                "have the same files and the same versions of llmtrain, tokenizers and transformers?"
            )


def _checked(source: Source, check: Callable[[Sequence[Example]], Sequence[str]] | None) -> Iterator[Placed]:
    """The examples of a source; before the first one is given, the first few chats are looked at."""
    examples = source.examples()
    first = list(islice(examples, _CHECKED))
    if check is not None:
        for warning in check([example for _, example in first if isinstance(example, Chat)]):
            log.warning("%s: %s", source.describe(), warning)
    yield from first
    yield from examples
