"""A batch of answers on disk: complete or not there, and continued where it was interrupted.

``OUT.partial`` grows line by line; when the last line is there it is renamed to ``OUT``. ``OUT.job.json`` says what the
file is made of (input, model, settings), so that nothing is continued with something else; it stays beside the output.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmtrain.errors import UserError
from llmtrain.json_text import parse_json


class Job:
    """The output of one batch.

    Args:
        output: the file to write.
        made_of: what the answers depend on, as plain JSON.
        about: what else is worth knowing; it may change.
    """

    def __init__(self, output: Path, made_of: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.record = output.with_name(output.name + ".job.json")
        self._made_of, self._about = dict(made_of), dict(about or {})

    def start(self, *, overwrite: bool) -> int | None:
        """Find out where to begin.

        Args:
            overwrite: whether the output of another job may be replaced.

        Returns:
            How many lines are there already; None if the output is complete.

        Raises:
            UserError: the output, or a part of it, is of something else.
        """
        if self.output.is_dir():
            raise UserError(f"--output {self.output}: is a folder. Give a file: {self.output / 'answers.jsonl'}")
        self._refuse_another_writer()
        record = self._read_record()
        same = record is not None and record.get("made_of") == self._made_of
        if same and record is not None:
            if self.partial.exists():
                return self._whole_lines()
            if record.get("complete") is True and self.output.exists() and not overwrite:
                return None
            if record.get("complete") is False:  # interrupted before the first line
                return 0
        unfinished = self.partial.exists() and self.partial.stat().st_size > 0
        if not overwrite and (unfinished or self.output.exists()):
            place = self.partial if unfinished else self.output
            raise UserError(
                f"{place} exists, {self._difference(record)}. Choose another --output, or pass --overwrite to "
                "begin anew."
            )
        self.partial.unlink(missing_ok=True)
        self._write_record(complete=False)
        return 0

    @contextmanager
    def writing(self) -> Iterator[IO[str]]:
        """The file to append lines to; when the block ends without an error, the output is complete.

        Raises:
            UserError: another process is writing it, or it cannot be written.
        """
        try:
            with self.partial.open("a", encoding="utf-8", newline="\n") as file:
                self._lock(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            self._write_record(complete=True)  # before the rename: until then the partial file says that it is not
            self.partial.replace(self.output)
        except OSError as error:  # the disk is full, say
            raise UserError(
                f"{error.filename or self.partial}: cannot be written: {error.strerror}. The answers that are there "
                "stay; when that is mended, the same command goes on behind them."
            ) from None

    def _refuse_another_writer(self) -> None:
        if self.partial.exists():
            with self.partial.open("a") as file:
                self._lock(file)

    def _lock(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.partial}: another process is writing it.") from None
        except OSError:
            pass  # a file system without locks

    def _whole_lines(self) -> int:
        """Cuts off what is behind the last whole line; returns how many there are."""
        count = end = 0
        with self.partial.open("rb") as file:
            for line in file:
                try:
                    whole = line.endswith(b"\n") and isinstance(parse_json(line), dict)
                except ValueError:
                    whole = False
                if not whole:
                    break
                count, end = count + 1, end + len(line)
        if end < self.partial.stat().st_size:
            os.truncate(self.partial, end)
        return count

    def _difference(self, record: dict[str, Any] | None) -> str:
        if record is None:
            return "and nothing says what it was made of"
        before = record.get("made_of")
        before = before if isinstance(before, dict) else {}
        keys = [key for key in {**before, **self._made_of} if before.get(key) != self._made_of.get(key)]
        if not keys:
            return "complete, of the same input, model and settings"
        said = []
        for key in keys:
            old, new = before.get(key), self._made_of.get(key)
            long = max(len(str(old)), len(str(new))) > 40
            said.append(key if long else f"{key} (was {old}, is {new})")
        return f"made of something else: {', '.join(said)}"

    def _read_record(self) -> dict[str, Any] | None:
        try:
            record = parse_json(self.record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.record}: cannot be read ({error}); remove it to begin anew.") from None
        return record if isinstance(record, dict) else None

    def _write_record(self, *, complete: bool) -> None:
        content = {"complete": complete, **self._about, "made_of": self._made_of}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        temporary = self.record.with_name(f".{self.record.name}.writing")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(self.record)
        except OSError as error:
            raise UserError(f"{self.record}: cannot be written: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)
