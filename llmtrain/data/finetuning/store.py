"""Tokenized examples on disk: made once, mapped into memory by every process that reads them.

A store is a folder: `ids.bin` (the ids of all examples, one after the other), `trained.bin` (a byte a token: 1 where it
is a target), `offsets.npy` (where each example begins), `places.txt` (a line an example: where it comes from),
`places.npy` (where each line begins) and `report.json` (what was read and dropped, and why). It is written under
another name and renamed when it is complete.
"""

import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llmtrain.conversations.messages import BadExample
from llmtrain.errors import UserError

_SHOWN_OF_EACH_REASON = 5


@dataclass
class Report:
    """What became of a source's rows."""

    source: str = ""
    """Where they came from, for messages."""
    rows: int = 0
    """Rows that were read."""
    examples: int = 0
    """Those that are trained on."""
    tokens: int = 0
    """Of these examples."""
    trained_tokens: int = 0
    """Tokens that are targets."""
    largest_id: int = -1
    """Largest token id; -1 without examples."""
    id_dtype: str = "uint32"
    """Of the ids on disk."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows that were dropped for it."""
    first_dropped: list[dict[str, str]] = field(default_factory=list)
    """The first few of each reason: `place`, `reason`, `detail`."""
    noticed: dict[str, int] = field(default_factory=dict)
    """What the tokenizer noticed in the examples that were kept (`truncated`): examples."""
    seconds: float = 0.0
    """Wall time of tokenizing."""

    def reasons(self, most: int = 3) -> str:
        """The dropped rows by reason, with where the first ones are; one line each."""
        lines = []
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            first = [entry for entry in self.first_dropped if entry["reason"] == reason][:most]
            where = "; ".join(
                f"{entry['place']} ({entry['detail']})" if entry["detail"] else entry["place"] for entry in first
            )
            lines.append(f"{count:,} x {reason}: {where}{', ...' if count > len(first) else ''}")
        return "\n".join(lines)


class DamagedStore(UserError):
    """A store whose files are not those that were written."""


class ExampleStore:
    """The examples of one source, as they were tokenized. Read-only; pickled by its path.

    Args:
        folder: made by `StoreWriter`.

    Raises:
        DamagedStore: a file is missing, cannot be read, or is not as long as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
            self.offsets: NDArray[np.int64] = np.load(folder / "offsets.npy")
            self._ids = _mapped(folder / "ids.bin", self.report.id_dtype)
            self._trained = _mapped(folder / "trained.bin", np.bool_)
        except (OSError, EOFError, ValueError, TypeError) as problem:
            raise DamagedStore(f"{folder} is damaged ({problem}); delete it") from problem
        # A slice behind the end of an array is no error: the examples there would come as empty ones.
        asked = (self.report.examples + 1, *[self.report.tokens] * 3)
        found = (len(self.offsets), int(self.offsets[-1:].sum()), len(self._ids), len(self._trained))
        if found != asked:
            raise DamagedStore(f"{folder} is damaged (it has lengths {found} where {asked} were written); delete it")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleStore, (self.folder,)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, (N,)."""
        return np.diff(self.offsets)

    def ids(self, example: int) -> NDArray[Any]:
        """Token ids of an example: (n,), uint16 or uint32."""
        return self._ids[self.offsets[example] : self.offsets[example + 1]]

    def trained(self, example: int) -> NDArray[np.bool_]:
        """Which of its tokens are targets: (n,); the first never is."""
        mask: NDArray[np.bool_] = self._trained[self.offsets[example] : self.offsets[example + 1]]
        return mask

    def place(self, example: int) -> str:
        """Where an example comes from: file and row, as they were named when it was tokenized."""
        starts = np.load(self.folder / "places.npy", mmap_mode="r")
        with (self.folder / "places.txt").open("rb") as lines:
            lines.seek(int(starts[example]))
            return lines.readline().decode("utf-8").rstrip("\n")


class StoreWriter:
    """Writes a store; a context manager. The folder is there when it ends without an exception, or not at all.

    Args:
        folder: the store to be. One that is there already stays, and what was written is thrown away: two runs that
            did the same work are no error.
        vocab_size: ids are below it; decides how many bytes one takes.
        source: for the report.
    """

    def __init__(self, folder: Path, *, vocab_size: int, source: str) -> None:
        self.folder = folder
        self.report = Report(source=source, id_dtype="uint16" if vocab_size <= 2**16 else "uint32")
        self.vocab_size = vocab_size
        self._dropped: Counter[str] = Counter()
        self._ends = [0]
        self._lines = [0]

    def __enter__(self) -> Self:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._work = Path(tempfile.mkdtemp(prefix=work_prefix(self.folder), suffix=".tmp", dir=self.folder.parent))
        self._ids, self._trained = (self._work / "ids.bin").open("wb"), (self._work / "trained.bin").open("wb")
        self._places = (self._work / "places.txt").open("wb")
        self._start = time.monotonic()
        return self

    def add(self, ids: NDArray[Any], trained: NDArray[np.bool_], place: str) -> None:
        """Append an example: `ids` and `trained`, (n,) each.

        Raises:
            UserError: an id is outside of the vocabulary.
        """
        largest = int(ids.max())
        if largest >= self.vocab_size:
            raise UserError(
                f"{place}: token id {largest} is outside of the model's vocabulary of {self.vocab_size}. Was it "
                "tokenized with another tokenizer (or is token_encoding_type wrong)?"
            )
        self._ids.write(np.ascontiguousarray(ids, self.report.id_dtype).tobytes())
        self._trained.write(np.ascontiguousarray(trained, np.bool_).tobytes())
        line = (" ".join(place.splitlines()) + "\n").encode("utf-8", "backslashreplace")
        self._places.write(line)
        self._lines.append(self._lines[-1] + len(line))
        self._ends.append(self._ends[-1] + len(ids))
        report = self.report
        report.rows += 1
        report.examples += 1
        report.tokens += len(ids)
        report.trained_tokens += int(trained.sum())
        report.largest_id = max(report.largest_id, largest)

    def drop(self, problem: BadExample, place: str) -> None:
        """Count a row that nothing can be learnt from."""
        self.report.rows += 1
        self._dropped[problem.reason] += 1
        if self._dropped[problem.reason] <= _SHOWN_OF_EACH_REASON:
            detail = problem.detail if len(problem.detail) < 300 else problem.detail[:300] + "..."
            self.report.first_dropped.append({"place": place, "reason": problem.reason, "detail": detail})

    def finished_report(self) -> Report:
        """The report, as of now."""
        self.report.dropped = dict(self._dropped)
        self.report.seconds = round(time.monotonic() - self._start, 3)
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                for file in (self._ids, self._trained, self._places):
                    file.flush()
                    if kind is None:
                        os.fsync(file.fileno())  # or a crash may leave the name and not what is in it
            finally:  # on a full disk each may fail
                for file in (self._ids, self._trained, self._places):
                    with contextlib.suppress(OSError):
                        file.close()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _finish(self) -> None:
        np.save(self._work / "offsets.npy", np.asarray(self._ends, np.int64))
        np.save(self._work / "places.npy", np.asarray(self._lines, np.int64))
        (self._work / "report.json").write_text(json.dumps(asdict(self.finished_report()), indent=1), encoding="utf-8")
        self._work.chmod(0o755)
        try:
            self._work.rename(self.folder)
        except OSError:
            if not (self.folder / "report.json").is_file():
                raise


def work_prefix(folder: Path) -> str:
    """What the names of unfinished stores begin with, that this machine makes."""
    return f".{folder.name}.{socket.gethostname()}."


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/llmtrain/examples, or ~/.cache/llmtrain/examples."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtrain" / "examples"


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    """A file as an array; an empty file cannot be mapped."""
    # As a plain view: a slice of a memmap object costs ten times as much.
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)
