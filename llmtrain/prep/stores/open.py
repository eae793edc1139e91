"""From a URL to its store."""

import os
import threading
from collections.abc import Callable

from llmtrain.errors import UserError
from llmtrain.prep.stores.store import Store
from llmtrain.redaction import without_password

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
    root = f"{scheme}://{place}/"
    if scheme == "s3":
        from llmtrain.prep.stores.s3 import S3Store

        return lambda: S3Store(place), root, path
    if scheme == "gs" and "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ:
        from llmtrain.prep.stores.s3 import S3Store

        return lambda: S3Store(place, **_gcs_through_s3()), root, path
    if scheme == "gs":
        from llmtrain.prep.stores.gcs import GcsStore

        return lambda: GcsStore(place), root, path
    if scheme == "azure":
        from llmtrain.prep.stores.azure import AzureStore

        container, _, blob = path.partition("/")
        if not container:
            raise UserError(f"{url}: expected azure://ACCOUNT.blob.core.windows.net/CONTAINER/PATH")
        return lambda: AzureStore(place, container), f"{root}{container}/", blob
    if scheme == "sftp":
        from llmtrain.prep.stores.sftp import SftpStore

        return lambda: SftpStore(place), root, path
    raise UserError(
        f"{without_password(url)}: {scheme}:// is not supported; use s3, gs, azure or sftp, or copy the files here"
    )


def _gcs_through_s3() -> dict[str, str]:
    """Google's storage speaks S3, too; that is what these two keys are for."""
    return {
        "endpoint_url": "https://storage.googleapis.com",
        "region_name": "auto",
        "aws_access_key_id": os.environ["GCS_KEY"],
        "aws_secret_access_key": os.environ["GCS_SECRET"],
    }
