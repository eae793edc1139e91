"""An export goes to a repository of the Hugging Face hub, or of a server that speaks like it (`HF_ENDPOINT`)."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmtrain.checkpoint.exported_files import of_an_export
from llmtrain.checkpoint.push import TRIALS, Pushed
from llmtrain.errors import UserError
from llmtrain.prep.stores.retry import persistently
from llmtrain.redaction import MASK

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)/?")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_AGAIN = {408, 425, 429}


def push_to_hub(folder: Path, files: list[str], destination: str, *, private: bool) -> Pushed:
    """Upload an export in one commit: a reader sees the whole of it or nothing.

    Args:
        folder: The export.
        files: Its files.
        destination: hf://USER/REPOSITORY.
        private: Of a repository that does not exist yet.

    Raises:
        UserError: no token, no rights, no network, or what arrived is not what was sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    name = repository_of(destination)
    api, token = _api()

    def attempt(doing: str, action: Callable[[], T]) -> T:
        return _persistently(action, f"{doing} {destination}", token)

    attempt("making", lambda: api.create_repo(name, private=private, exist_ok=True))
    before: dict[str, Any] = attempt("listing", lambda: _listed(api, name, "main"))
    old = [path for path in before if path not in files and of_an_export(path)]
    # Not `upload_folder`: since huggingface_hub 2 it may make several commits.
    commit: Any = attempt(
        "uploading to",
        lambda: api.create_commit(
            name,
            [
                *(CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder / file)) for file in files),
                *(CommitOperationDelete(path_in_repo=path) for path in old),
            ],
            commit_message=f"{folder.name}, exported by llmtrain",
        ),
    )
    there: dict[str, Any] = attempt("listing", lambda: _listed(api, name, commit.oid))
    problems = [problem for file in files if (problem := _problem(folder / file, there.get(file)))]
    if problems:
        raise UserError(f"{destination}: did not arrive as it was sent: {'; '.join(problems[:4])}")
    size = sum((folder / file).stat().st_size for file in files)
    return Pushed(f"{destination} ({commit.oid[:8]})", len(files), size, "each file's size and hash compared")


def reach_hub(destination: str) -> str:
    """Ask the hub who the token belongs to, and whether it may write.

    Raises:
        UserError: it may not, or cannot be asked.
    """
    repository_of(destination)
    api, token = _api()
    who = _persistently(lambda: dict(api.whoami()), f"asking the hub about {destination}", token, most=TRIALS)
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UserError(f"{destination}: the token in HF_TOKEN can only read. Make one that writes, on the hub's page.")
    return f"{destination}: the hub knows the token, of {who.get('name', 'somebody')}"


def repository_of(destination: str) -> str:
    """USER/REPOSITORY of hf://USER/REPOSITORY.

    Raises:
        UserError: it is none.
    """
    match = _NAME.fullmatch(destination)
    if match is None:
        raise UserError(f"{destination}: expected hf://USER/REPOSITORY")
    return match[1]


def _api() -> tuple["HfApi", str]:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    token = next((value for key in _TOKENS if (value := os.environ.get(key, "").strip())), None)
    if token is None:
        raise UserError("Pushing to a hub needs a token that may write, in the environment variable HF_TOKEN.")
    disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="llmtrain"), token


def _listed(api: "HfApi", name: str, revision: str) -> dict[str, Any]:
    return {entry.path: entry for entry in api.list_repo_tree(name, recursive=True, revision=revision)}


def _problem(file: Path, there: Any) -> str | None:
    """How a file in the repository differs: by size, and by git's hash, or SHA-256 where it is stored apart."""
    size = file.stat().st_size
    if there is None:
        return f"{file.name} is not there"
    if there.size != size:
        return f"{file.name} has {there.size:,} bytes instead of {size:,}"
    with file.open("rb") as stream:
        if there.lfs is not None:
            same = hashlib.file_digest(stream, "sha256").hexdigest() == there.lfs["sha256"]
        else:
            same = hashlib.sha1(b"blob %d\0" % size + stream.read()).hexdigest() == there.blob_id
    return None if same else f"{file.name} has another hash"


def _persistently(action: Callable[[], T], doing: str, token: str, most: int | None = None) -> T:
    """Again after a growing pause where the hub or the way to it fails.

    Raises:
        UserError: too often, or for a reason that stays; without the token.
    """

    def once() -> T:
        with _errors(token):
            return action()

    try:
        return persistently(once, doing, most=most)
    except FileNotFoundError as problem:
        raise UserError(f"{doing}: {problem}") from None


@contextmanager
def _errors(token: str) -> Iterator[None]:
    """The hub's errors as those of a storage: what stays is a PermissionError, what may pass a ConnectionError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise PermissionError("HF_HUB_OFFLINE=1 is set, which forbids it. Unset it.") from None
    except HFValidationError as problem:
        raise PermissionError(_clean(problem, token)) from None
    except Exception as problem:
        cause = problem.__cause__ if isinstance(problem, RuntimeError) and problem.__cause__ else problem
        if isinstance(cause, HfHubHTTPError):
            raise _by_status(cause, token) from None
        package = type(cause).__module__.partition(".")[0]
        if isinstance(cause, OSError) or package in {"httpx", "httpx2", "httpcore", "requests", "urllib3"}:
            raise ConnectionError(f"cannot be reached: {_clean(cause, token)}") from None
        raise


def _by_status(problem: Any, token: str) -> OSError:
    status = getattr(getattr(problem, "response", None), "status_code", None)
    text = _clean(problem, token)
    if status == 401:
        return PermissionError(f"the hub does not accept the token in HF_TOKEN (401). {text}")
    if status == 403:
        return PermissionError(f"the token in HF_TOKEN may not write there (403). {text}")
    if status == 404:
        return PermissionError(f"there is no such repository, or the token may not see it (404). {text}")
    if status is not None and 400 <= status < 500 and status not in _AGAIN:
        return PermissionError(text)
    return ConnectionError(text)


def _clean(problem: BaseException, token: str) -> str:
    return " ".join(str(problem).split())[:300].replace(token, MASK)
