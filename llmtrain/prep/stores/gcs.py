"""Google Cloud Storage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.prep.stores.store import Changed, StoredFile

_TIMEOUT = (15, 60)  # seconds to connect, and between two packets


class GcsStore:
    """A bucket, with the credentials that Google's libraries find (`GOOGLE_APPLICATION_CREDENTIALS`, gcloud's, a
    machine's own). For `GCS_KEY` and `GCS_SECRET`, which Streaming knows too, see `open_store`.
    """

    def __init__(self, bucket: str) -> None:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud.storage import Client

        try:
            self._client = Client()
        except (DefaultCredentialsError, OSError) as problem:
            raise PermissionError(str(problem)) from problem
        self._bucket = self._client.bucket(bucket)

    def stat(self, path: str) -> StoredFile:
        """See `Store`."""
        with _errors():
            blob = self._bucket.get_blob(path, timeout=_TIMEOUT, retry=None)
        if blob is None:
            raise FileNotFoundError(path)
        return _stored(blob)

    def files(self, prefix: str, depth: int | None = None) -> Iterator[StoredFile]:
        """See `Store`."""
        with _errors():
            for blob in self._client.list_blobs(self._bucket, prefix=prefix, timeout=_TIMEOUT, retry=None):
                yield _stored(blob)

    def read(self, file: StoredFile, start: int, length: int) -> bytes:
        """See `Store`. Bytes as they are stored, also where the storage would decompress them on the way."""
        with _errors():
            data: bytes = self._bucket.blob(file.path).download_as_bytes(
                start=start,
                end=start + length - 1,
                raw_download=True,
                if_generation_match=int(file.version),
                timeout=_TIMEOUT,
                retry=None,
            )
        if not data:
            raise ConnectionError("the storage sent nothing")
        return data

    def put(self, path: str, content: bytes | Path, sent: Callable[[int], None] | None = None) -> None:
        """See `Store`. The storage compares an MD5."""
        blob = self._bucket.blob(path)
        with _errors():
            if isinstance(content, Path):
                with content.open("rb") as file:
                    blob.upload_from_file(
                        file, size=content.stat().st_size, checksum="md5", timeout=_TIMEOUT, retry=None
                    )
            else:
                blob.upload_from_string(
                    content, "application/octet-stream", checksum="md5", timeout=_TIMEOUT, retry=None
                )

    def remove(self, path: str) -> None:
        """See `Store`."""
        try:
            with _errors():
                self._bucket.blob(path).delete(timeout=_TIMEOUT, retry=None)
        except FileNotFoundError:
            pass

    def prune(self, folder: str, *, leftovers: bool = False) -> None:
        """There are no folders."""


def _stored(blob: Any) -> StoredFile:
    return StoredFile(blob.name, blob.size, int(blob.updated.timestamp() * 10**6) * 1000, str(blob.generation))


@contextmanager
def _errors() -> Iterator[None]:
    from google.api_core.exceptions import ClientError, GoogleAPIError, NotFound, PreconditionFailed, TooManyRequests
    from google.auth.exceptions import GoogleAuthError, TransportError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    from requests.exceptions import RequestException

    try:
        yield
    except NotFound as problem:
        raise FileNotFoundError(str(problem)) from problem
    except PreconditionFailed as problem:
        raise Changed from problem
    except (TooManyRequests, TransportError, DataCorruption, InvalidResponse, RequestException) as problem:
        raise ConnectionError(str(problem)) from problem
    except (ClientError, GoogleAuthError) as problem:
        raise PermissionError(str(problem)) from problem
    except GoogleAPIError as problem:
        raise ConnectionError(str(problem)) from problem
