"""How far a run has come, from the files that it leaves. Light."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"ep\d+-ba(\d+)")
_TAIL = 1 << 16


@dataclass(frozen=True, order=True)
class Progress:
    """What a run has reached.

    Attributes:
        checkpoint: step of the newest checkpoint; -1 when there is none.
        step: the last step in metrics.jsonl; -1 when there is none.
    """

    checkpoint: int = -1
    step: int = -1

    def further_than(self, best: "Progress") -> bool:
        """Whether there is a newer checkpoint, or a step that was never reached before."""
        return self.checkpoint > best.checkpoint or self.step > best.step

    def together_with(self, other: "Progress") -> "Progress":
        """The further one of each."""
        return Progress(max(self.checkpoint, other.checkpoint), max(self.step, other.step))


def progress(run: Path, save_folder: Path | None) -> Progress:
    """How far the run has come.

    Args:
        run: its folder, runs/NAME.
        save_folder: of its checkpoints; None when it saves none, or elsewhere than on this machine's disks.
    """
    return Progress(_newest_checkpoint(save_folder), _last_step(run / "metrics.jsonl"))


def _newest_checkpoint(folder: Path | None) -> int:
    try:
        names = [entry.name for entry in folder.iterdir()] if folder is not None else []
    except OSError:
        return -1
    return max((int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))), default=-1)


def _last_step(metrics: Path) -> int:
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return -1
    for line in reversed(lines[:-1]):  # what follows the last newline is not finished
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return -1
