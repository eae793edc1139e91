"""Names that an index, a manifest or a listing gives to files of its own folder. Light."""

from pathlib import Path, PurePosixPath, PureWindowsPath

LONGEST_PART = 255
"""Bytes of a file's name on every usual file system."""
LONGEST = 1024
"""Bytes of a name with its folders."""


def why_outside(name: str) -> str | None:
    """Why a name is none of a file below the folder that lists it; None for a good one.

    Both kinds of slashes count, so that what is refused does not depend on who reads it.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not posix.parts or "\0" in name:
        return "it has a NUL in it" if "\0" in name else "it is empty" if not name else "it is the folder itself"
    if posix.is_absolute() or windows.drive or windows.root:
        return "it is absolute"
    if "\\" in name:
        return "it has a backslash in it"
    if ".." in {*posix.parts, *windows.parts}:
        return "it climbs up"
    size = len(name.encode(errors="replace"))
    if size > LONGEST or any(len(part.encode(errors="replace")) > LONGEST_PART for part in posix.parts):
        return f"it has {size:,} bytes"
    return None


def leads_outside(folder: Path, name: str) -> bool:
    """Whether a file of a folder is a link to somewhere else, or lies behind one. The folder itself may be one."""
    return not (folder / name).resolve().is_relative_to(folder.resolve())
