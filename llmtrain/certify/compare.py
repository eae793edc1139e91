"""Two runs, compared exactly: what they trained on, what it came to, and what they leave."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from llmtrain.checkpoint.resolve import checkpoints_in
from llmtrain.checkpoint.unpickle import load_full, load_object, read_metadata
from llmtrain.errors import UserError
from llmtrain.training.loss_curve import read_metrics

TOLERANCE = 1e-5
"""Largest relative difference of losses on another number of ranks, whose sums round differently."""

NOT_COMPARED = (
    "state.run_name",
    "*_wct",  # wall-clock times
    "state.metadata.*",  # of the machine
    "state.algorithms",  # descriptions for people, with addresses in memory
    "state.callbacks.SpeedMonitor.*",
    "state.callbacks.RuntimeEstimator.*",
)
"""Keys of a checkpoint that differ between any two runs: their names and times."""


@dataclass(frozen=True)
class Difference:
    """The first place where two runs are not the same.

    Attributes:
        where: step, or checkpoint.
        key: what differs.
        undisturbed: its value in the run that nobody killed.
        disturbed: its value in the other.
    """

    where: str
    key: str
    undisturbed: str
    disturbed: str

    def __str__(self) -> str:
        return f"{self.where}, {self.key}: {self.undisturbed} undisturbed, {self.disturbed} after the kills"


@dataclass(frozen=True)
class Compared:
    """How much two checkpoints have in common.

    Attributes:
        tensors: number of them, those of the random states included.
        size: their bytes.
        values: other things: times, rates, positions in the data.
    """

    tensors: int
    size: int
    values: int


def compare_steps(
    undisturbed: Mapping[int, Mapping[str, Any]], rows: Iterable[Mapping[str, Any]], *, elastic: bool = False
) -> Difference | None:
    """The first difference of recorded steps.

    Args:
        undisturbed: rows of `steps.jsonl` of the run that nobody killed, by step.
        rows: of the other.
        elastic: on other numbers of ranks: samples are compared as the global batch has them, whichever rank reads
            them; losses up to `TOLERANCE`; random states not at all.
    """
    for row in rows:
        step, where = int(row["step"]), f"step {row['step']}"
        if (expected := undisturbed.get(step)) is None:
            return Difference(where, "step", "there is none", "there is one")
        pairs = _elastic_pairs(expected, row) if elastic else _exact_pairs(expected, row)
        for key, ours, theirs in pairs:
            if ours != theirs:
                return Difference(where, key, _short(ours), _short(theirs))
    return None


def compare_all_steps(
    undisturbed: Mapping[int, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, elastic: bool = False
) -> Difference | None:
    """The same for a whole run: each step stands there once, in order."""
    steps, expected = [int(row["step"]) for row in rows], sorted(undisturbed)
    if steps != expected:
        return Difference("the whole run", "steps that are recorded", _short(expected), _short(steps))
    return compare_steps(undisturbed, rows, elastic=elastic)


def largest_loss_difference(undisturbed: Mapping[int, Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> float:
    """Largest relative difference of two runs' losses."""
    return max(
        (
            _relative(float.fromhex(value), float.fromhex(row["loss"][name]))
            for row in rows
            if int(row["step"]) in undisturbed
            for name, value in undisturbed[int(row["step"])]["loss"].items()
        ),
        default=0.0,
    )


def compare_evaluations(undisturbed: Path, disturbed: Path, *, elastic: bool = False) -> tuple[int, Difference | None]:
    """Compares the results of evaluations in two runs' metrics.jsonl.

    Returns:
        How many there are, and the first difference.
    """
    expected, found = (_evaluations(run) for run in (undisturbed, disturbed))
    for place in sorted({**expected, **found}):
        ours, theirs = expected.get(place), found.get(place)
        same = ours == theirs
        if elastic and ours is not None and theirs is not None:
            same = _relative(ours, theirs) <= TOLERANCE
        if not same:
            return len(expected), Difference(f"step {place[0]}", place[1], _short(ours), _short(theirs))
    return len(expected), None


def compare_checkpoints(undisturbed: Path, disturbed: Path) -> tuple[Compared, Difference | None]:
    """Compares all that two checkpoints hold, but `NOT_COMPARED`.

    Returns:
        How much there is, and the first difference.
    """
    where = f"checkpoint {undisturbed.name}"
    first, second = _content(undisturbed), _content(disturbed)
    tensors = size = values = 0
    for key in sorted({**first, **second}, key=_order):
        if any(fnmatchcase(key, pattern) for pattern in NOT_COMPARED):
            continue
        if key not in first or key not in second:
            there = ("missing" if key not in of else "there" for of in (first, second))
            return Compared(tensors, size, values), Difference(where, key, *there)
        ours, theirs = first[key], second[key]
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            tensors, size = tensors + 1, size + ours.numel() * ours.element_size()
            if (place := _first_bit(ours, theirs)) is not None:
                return Compared(tensors, size, values), Difference(where, f"{key}{place[0]}", *place[1:])
        else:
            values += 1
            if _plain(ours) != _plain(theirs):
                return Compared(tensors, size, values), Difference(where, key, _short(ours), _short(theirs))
    return Compared(tensors, size, values), None


def last_checkpoint(run: Path) -> Path:
    """A run's newest checkpoint.

    Raises:
        UserError: there is none.
    """
    found = checkpoints_in(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: there is no checkpoint.")
    return found[0].path


def _exact_pairs(expected: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield "epoch", expected["epoch"], row["epoch"]
    yield "number of ranks", len(expected["samples"]), len(row["samples"])
    for rank, (ours, theirs) in enumerate(zip(expected["samples"], row["samples"], strict=True)):
        yield f"samples of rank {rank}", ours, theirs
    for rank, (ours, theirs) in enumerate(zip(expected["rng"], row["rng"], strict=True)):
        yield f"random state of rank {rank}", ours, theirs
    yield from _losses_and_rates(expected, row)


def _elastic_pairs(expected: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield "epoch", expected["epoch"], row["epoch"]
    yield "samples of the global batch", _whole_batch(expected), _whole_batch(row)
    for name, value in expected["loss"].items():
        ours, theirs = float.fromhex(value), float.fromhex(row["loss"].get(name, "nan"))
        if not _relative(ours, theirs) <= TOLERANCE:
            yield f"{name} (more than {TOLERANCE:g} apart)", ours, theirs
    yield "learning rate", expected["lr"], row["lr"]


def _whole_batch(row: Mapping[str, Any]) -> list[list[int]]:
    """The rows of all ranks, whichever has them."""
    return sorted(samples for of_rank in row["samples"] for samples in of_rank)


def _losses_and_rates(expected: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in {**expected["loss"], **row["loss"]}:
        yield name, _readable(expected["loss"].get(name)), _readable(row["loss"].get(name))
    yield "learning rate", expected["lr"], row["lr"]


def _readable(value: str | None) -> str:
    return "none" if value is None else f"{float.fromhex(value):.9g} ({value})"


def _relative(ours: float, theirs: float) -> float:
    if ours == theirs:
        return 0.0
    return abs(ours - theirs) / max(abs(ours), abs(theirs)) if math.isfinite(ours - theirs) else math.inf


def _evaluations(run: Path) -> dict[tuple[int, str], float]:
    found = {}
    for row in read_metrics(run / "metrics.jsonl"):
        for key, value in row.items():
            if key.startswith("metrics/") and isinstance(value, (int, float)):
                found[int(row["step"]), key] = float(value)
    return found


def _content(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint by its key; tensors whole and on the CPU. Nothing in it is run."""
    if not (checkpoint / ".metadata").is_file():
        return dict(_leaves(load_full(checkpoint / "full.pt"), ""))
    metadata = read_metadata(checkpoint)
    content: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # torch says that this is a single process
        load(dict(content), storage_reader=FileSystemReader(checkpoint), no_dist=True)
    for index, place in metadata.storage_data.items():
        if index.fqn not in content:
            with (checkpoint / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content[index.fqn] = load_object(BytesIO(file.read(place.length)), f"{checkpoint}: `{index.fqn}`")
    return content


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value


def _order(key: str) -> tuple[int, str]:
    """Weights first: they are what a user asks about first."""
    return (0 if key.startswith("state.model.") else 1 if key.startswith("state.optimizers.") else 2, key)


def _first_bit(ours: Tensor, theirs: Tensor) -> tuple[str, str, str] | None:
    """Place and both values of the first element whose bits differ."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return " shape and dtype", f"{ours.dtype} {list(ours.shape)}", f"{theirs.dtype} {list(theirs.shape)}"
    if ours.numel() == 0:
        return None
    width = ours.element_size()
    left, right = (x.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(-1, width) for x in (ours, theirs))
    differs = np.flatnonzero((left != right).any(axis=1))
    if not len(differs):
        return None
    place = [int(i) for i in np.unravel_index(int(differs[0]), tuple(ours.shape))] if ours.ndim else []
    one, other = (repr(x.reshape(-1)[int(differs[0])].item()) for x in (ours, theirs))
    return f"{place} and {len(differs) - 1} more elements", one, other


def _plain(value: Any) -> Any:
    """Something whose `==` is a single answer."""
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), value.tolist())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _short(value: object, most: int = 100) -> str:
    text = repr(value) if isinstance(value, float) else str(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."
