"""`llmtrain data verify`: whether shards are, byte for byte, what was written. Imports neither torch nor Streaming."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from llmtrain.data.mds_files import Damage, FileEntry, Index, Rows, ShardEntry, digest, read_index, unpack
from llmtrain.data.shards import INDEX, MANIFEST, require_index
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json
from llmtrain.progress import progress


@dataclass
class Checked:
    """What was found in a folder."""

    folder: Path
    shards: int = 0
    rows: int = 0
    bytes: int = 0
    """Size of the shards as they lie there."""
    hashes: set[str] = field(default_factory=set)
    """Algorithms that every shard was checked by; without any, only sizes, structure and decompression were."""
    damages: list[tuple[str, str]] = field(default_factory=list)
    """Path within the folder, what is wrong."""

    def damaged(self, name: str, what: str) -> None:
        """Take down a damage."""
        self.damages.append((name, what))


class Sound(NamedTuple):
    """A shard whose file is in order."""

    number: int
    entry: ShardEntry
    rows: Rows


def verify_command(places: Sequence[Path], console: Console | None = None) -> bool:
    """Check every shard below some places, and print each that is damaged, with what is wrong.

    Args:
        places: folders of shards, or folders that have some below (`OUT` of `llmtrain prep`, a mixture).
        console: where to; standard output when left out.

    Returns:
        Whether nothing is damaged.

    Raises:
        UserError: there are no shards in a place, or an index names files outside of its folder.
    """
    console = console or Console(highlight=False)
    folders = folders_of(places)
    found = []
    with progress(console, "checking", total_bytes(folders), "bytes") as advance:
        for folder in folders:
            checked = Checked(folder)
            deque(sound_shards(checked, advance), maxlen=0)
            found.append(checked)
    found += missing_splits(places)
    print_checked(console, found)
    return not any(checked.damages for checked in found)


def folders_of(places: Sequence[Path]) -> list[Path]:
    """The folders with an index at or below some places, each once; one within another's folder belongs to it.

    Raises:
        UserError: there is none in a place.
    """
    found: list[Path] = []
    for place in places:
        if re.match(r"[a-z][a-z0-9+.-]*:/", str(place)):
            raise UserError(
                f"{place}: only folders on this machine can be looked at; copy the shards here, or mount them"
            )
        if (place / INDEX).is_file():
            found.append(place)
            continue
        below = [
            path.parent
            for path in sorted(place.rglob(INDEX))
            if not any(part.startswith(".") for part in path.relative_to(place).parts)
        ]
        outermost = [folder for folder in below if not set(folder.parents) & set(below)]
        if not outermost:
            require_index(place, str(place))
        found += outermost
    return list(dict.fromkeys(found))


def total_bytes(folders: Sequence[Path]) -> int:
    """What their shards take, as far as the indexes can be read."""
    total = 0
    for folder in folders:
        try:
            total += sum(shard.size for shard in read_index(folder).shards)
        except Damage:
            continue
    return total


def sound_shards(checked: Checked, advance: Callable[[int], None]) -> Iterator[Sound]:
    """Check all files of a folder, one shard in memory at a time, and give those that are in order.

    Args:
        checked: takes down what is found.
        advance: is called with the bytes that were done since the last call.
    """
    folder = checked.folder
    try:
        index = read_index(folder)
    except Damage as damage:
        checked.damaged(INDEX, str(damage))
        return
    checked.shards = len(index.shards)
    checked.rows = sum(shard.samples for shard in index.shards)
    checked.bytes = sum(shard.size for shard in index.shards)
    files = [shard.zip_data or shard.raw_data for shard in index.shards]
    named = set.intersection(*(set(file.hashes) for file in files)) if files else set()
    checked.hashes = {name for name in named if digest(name, b"") is not None}
    for number, entry in enumerate(index.shards):
        try:
            rows = read_shard(folder, entry)
        except Damage as damage:
            checked.damaged(entry.name, str(damage))
        else:
            yield Sound(number, entry, rows)
            del rows  # or two of them would be in memory while the next one is read
        advance(entry.size)
    for name in _extra_files(folder, index):
        checked.damaged(name, "is not in the index: left by another run, or the index is not this folder's")
    _check_counts(checked)


def read_shard(folder: Path, entry: ShardEntry) -> Rows:
    """One shard: its file, or both where a compressed and a decompressed one lie there (as in a loader's cache).

    Raises:
        Damage: a file is missing or is not what the index says.
    """
    raw = _read(folder, entry.raw_data)
    packed = None if entry.zip_data is None else _read(folder, entry.zip_data)
    if raw is None and packed is None:
        raise Damage("is missing")
    if packed is not None:
        assert entry.zip_data is not None
        assert entry.compression is not None
        unpacked = _check_packed(packed, entry)
        if raw is not None and raw != unpacked:
            raise Damage(f"{entry.raw_data.basename}, which lies beside it, is not what it decompresses to")
        raw = unpacked
    else:
        assert raw is not None
        _check_size(raw, entry.raw_data)
        wrong = _wrong_hashes(raw, entry.raw_data)
        if wrong:
            raise Damage(_changed(wrong, entry.raw_data))
    return Rows(raw, entry)


def _check_packed(packed: bytes, entry: ShardEntry) -> bytes:
    assert entry.zip_data is not None
    assert entry.compression is not None
    _check_size(packed, entry.zip_data)
    wrong = _wrong_hashes(packed, entry.zip_data)
    try:
        raw = unpack(packed, entry.compression, entry.raw_data.bytes)
        if len(raw) != entry.raw_data.bytes:
            more = "more than " if len(raw) > entry.raw_data.bytes else ""
            raise Damage(
                f"decompresses to {more}{min(len(raw), entry.raw_data.bytes):,} bytes, "
                f"the index says {entry.raw_data.bytes:,}"
            )
    except Damage as damage:
        raise Damage(f"{_changed(wrong, entry.zip_data)}; {damage}" if wrong else str(damage)) from damage
    wrong_raw = _wrong_hashes(raw, entry.raw_data)
    if wrong and entry.raw_data.hashes and not wrong_raw:
        raise Damage(f"the index lists a wrong hash of it ({'; '.join(wrong)}): what it decompresses to is right")
    if wrong:
        raise Damage(_changed(wrong, entry.zip_data))
    if wrong_raw:
        said = f"another hash than the index lists ({'; '.join(wrong_raw)})"
        own = "" if not entry.zip_data.hashes else "; the file's own hash is right, so the index is not"
        raise Damage(f"what it decompresses to has {said}{own}")
    return raw


def _read(folder: Path, file: FileEntry) -> bytes | None:
    try:
        return (folder / file.basename).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise Damage(f"cannot be read: {problem.strerror or problem}") from problem


def _check_size(data: bytes, file: FileEntry) -> None:
    if len(data) < file.bytes:
        raise Damage(f"is truncated: {len(data):,} of {file.bytes:,} bytes")
    if len(data) > file.bytes:
        raise Damage(f"is {len(data) - file.bytes:,} bytes longer than the {file.bytes:,} that the index says")


def _wrong_hashes(data: bytes, file: FileEntry) -> list[str]:
    wrong = []
    for name, said in sorted(file.hashes.items()):
        found = digest(name, data)
        if found is not None and found != said:
            wrong.append(f"{name} {found}, index {said}")
    return wrong


def _changed(wrong: Sequence[str], file: FileEntry) -> str:
    if len(wrong) < len(file.hashes):
        return f"the index lists a wrong hash of it: {'; '.join(wrong)}"
    return f"its bytes have changed, or the index lists a wrong hash: {'; '.join(wrong)}"


def _extra_files(folder: Path, index: Index) -> list[str]:
    """Shards that the index does not name; other files are nobody's business."""
    named = {file.basename for shard in index.shards for file in (shard.raw_data, shard.zip_data) if file is not None}
    there = (path.relative_to(folder) for path in folder.rglob("*.mds*") if path.is_file())
    return sorted(
        str(path) for path in there if path.as_posix() not in named and not any(p.startswith(".") for p in path.parts)
    )


def manifest_of(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The nearest `prep.json` at or above a folder of shards, and where it is; None for shards of another origin."""
    folder = folder.resolve()
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / MANIFEST).is_file():
            try:
                content = parse_json((place / MANIFEST).read_bytes())
            except ValueError as problem:
                raise UserError(f"{place / MANIFEST} is damaged: {problem}") from problem
            return (place, content) if isinstance(content, dict) else None
    return None


def _check_counts(checked: Checked) -> None:
    """An index that has lost its last shards looks complete; what `llmtrain prep` counted tells."""
    made = manifest_of(checked.folder)
    if made is None:
        return
    name = checked.folder.resolve().relative_to(made[0]).as_posix()
    wanted = (made[1].get("splits") or {}).get(name, {}).get("samples")
    if wanted is not None and wanted != checked.rows:
        checked.damaged(INDEX, f"lists {checked.rows:,} rows, {MANIFEST} says {wanted:,}")


def missing_splits(places: Sequence[Path]) -> list[Checked]:
    """Splits that `prep.json` in one of the places lists, and that have no index."""
    found = []
    for place in places:
        made = manifest_of(place) if (place / MANIFEST).is_file() else None
        for name, counts in ((made[1].get("splits") or {}) if made else {}).items():
            if counts.get("samples") and not (place / name / INDEX).is_file():
                lost = Checked(place / name)
                lost.damaged(INDEX, f"is missing; {MANIFEST} says {counts['samples']:,} rows")
                found.append(lost)
    return found


def print_checked(console: Console, found: Sequence[Checked]) -> None:
    """One line a folder, and one for each damage."""
    for checked in found:
        how = ", ".join(sorted(checked.hashes)) or "no hashes to check by: sizes and structure only"
        state = f"{len(checked.damages):,} DAMAGED" if checked.damages else "ok"
        console.print(
            f"{checked.folder}: {state} ({checked.shards:,} shards, {checked.rows:,} rows, "
            f"{checked.bytes / 1e6:,.2f} MB; {how})",
            soft_wrap=True,
            markup=False,
        )
        for name, what in checked.damages:
            console.print(f"  {checked.folder / name}: {what}", soft_wrap=True, markup=False)
    if any(checked.damages for checked in found):
        console.print("Fetch the damaged files again where they came from, or make the data again with llmtrain prep.")
