"""Which code wrote a checkpoint: the commit of the checkout, and a hash of the package's own files. No git is run."""

from functools import cache
from pathlib import Path

import xxhash

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def code_version() -> dict[str, str]:
    """`files`: xxh128 of the package's Python files, changed ones included; `commit`: of the checkout, if it is one."""
    digest = xxhash.xxh3_128()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode())
        digest.update(path.read_bytes())
    commit = commit_of(_PACKAGE.parent)
    return {"files": digest.hexdigest(), **({"commit": commit} if commit else {})}


def commit_of(checkout: Path) -> str | None:
    """The commit that is checked out; None where the folder is no repository, or has no commit."""
    try:
        git = checkout / ".git"
        if git.is_file():  # a worktree: "gitdir: PATH"
            git = checkout / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head or None
        name = head.removeprefix("ref:").strip()
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
        for place in (git / name, common / name):
            if place.is_file():
                return place.read_text().strip() or None
        packed = (common / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except (OSError, UnicodeDecodeError):
        return None
