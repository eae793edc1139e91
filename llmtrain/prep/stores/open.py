"""From a URL to its store."""

import os
import threading
from collections.abc import Callable

from llmtrain.data.shards import without_password
from llmtrain.errors import UserError
from llmtrain.prep.stores.store import Store

_opened: dict[tuple[int, str], Store] = {}
_lock = threading.Lock()


def open_store(url: str) -> tuple[Store, str, str]:
    """The store of a URL, the part of the URL that stands for it, and the path in it.

    A process opens each store once; a forked one does not use what its parent has opened.

    Raises:
        UserError: it is no URL of a storage that llmtrain knows, or the storage cannot be used.
    """
    make, root, path = _split(url)
    key = (os.getpid(), root)
    with _lock:
        if key not in _opened:
            try:
                _opened[key] = make()
            except OSError as problem:
                raise UserError(f"{without_password(root)} cannot be used: {problem}") from problem
        return _opened[key], root, path


def _split(url: str) -> tuple[Callable[[], Store], str, str]:
    scheme, _, rest = url.partition("://")
    place, _, path = rest.partition("/")
    if not place:
        raise UserError(f"{without_password(url)}: expected {scheme}://PLACE/PATH")
    if scheme == "s3":
        from llmtrain.prep.stores.s3 import S3Store

        return lambda: S3Store(place), f"s3://{place}/", path
    raise UserError(
        f"{without_password(url)}: {scheme}:// is not supported; use s3, gs, azure or sftp, or copy the files here"
    )
