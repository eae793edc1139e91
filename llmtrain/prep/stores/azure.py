"""Azure Blob Storage."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.prep.stores.store import Changed, StoredFile

_ONE_REQUEST = 1 << 28  # larger files are uploaded in blocks, and appear when the list of blocks is written


class AzureStore:
    """A container of a storage account.

    As with Streaming, the account is `AZURE_ACCOUNT_NAME`, otherwise the first part of the URL's host; the key
    `AZURE_ACCOUNT_ACCESS_KEY`, otherwise what azure-identity finds (`az login`, a machine's identity).
    `AZURE_STORAGE_CONNECTION_STRING` goes before all that.
    """

    def __init__(self, host: str, container: str) -> None:
        from azure.storage.blob import BlobServiceClient

        options: dict[str, Any] = {
            "retry_total": 0,
            "connection_timeout": 15,
            "read_timeout": 60,
            "max_single_put_size": _ONE_REQUEST,
            "max_single_get_size": 1 << 25,
        }
        with _errors():
            if connection := os.environ.get("AZURE_STORAGE_CONNECTION_STRING"):
                service = BlobServiceClient.from_connection_string(connection, **options)
            else:
                account = os.environ.get("AZURE_ACCOUNT_NAME") or host.partition(".")[0]
                url = f"https://{account}.blob.core.windows.net"
                service = BlobServiceClient(url, credential=_credential(), **options)
            self._container = service.get_container_client(container)

    def stat(self, path: str) -> StoredFile:
        """See `Store`."""
        with _errors():
            return _stored(self._container.get_blob_client(path).get_blob_properties())

    def files(self, prefix: str, depth: int | None = None) -> Iterator[StoredFile]:
        """See `Store`."""
        with _errors():
            for blob in self._container.list_blobs(name_starts_with=prefix or None):
                yield _stored(blob)

    def read(self, file: StoredFile, start: int, length: int) -> bytes:
        """See `Store`."""
        from azure.core import MatchConditions

        with _errors():
            data: bytes = self._container.download_blob(
                file.path,
                offset=start,
                length=length,
                etag=file.version,
                match_condition=MatchConditions.IfNotModified,
                max_concurrency=1,
            ).readall()
        if not data:
            raise ConnectionError("the storage sent nothing")
        return data

    def put(self, path: str, content: bytes | Path, sent: Callable[[int], None] | None = None) -> None:
        """See `Store`. The storage compares an MD5."""
        client = self._container.get_blob_client(path)
        with _errors():
            if isinstance(content, bytes):
                client.upload_blob(content, overwrite=True, validate_content=True)
                return
            from azure.storage.blob import ContentSettings

            with content.open("rb") as file:
                digest = bytearray(hashlib.file_digest(file, "md5").digest())
                file.seek(0)
                settings = ContentSettings(content_md5=digest)
                client.upload_blob(
                    file,
                    length=content.stat().st_size,
                    overwrite=True,
                    validate_content=True,
                    content_settings=settings,
                )

    def remove(self, path: str) -> None:
        """See `Store`."""
        try:
            with _errors():
                self._container.delete_blob(path)
        except FileNotFoundError:
            pass

    def prune(self, folder: str, *, leftovers: bool = False) -> None:
        """There are no folders."""


def _credential() -> Any:
    if key := os.environ.get("AZURE_ACCOUNT_ACCESS_KEY"):
        return key
    from azure.identity import AzureCliCredential, ChainedTokenCredential, DefaultAzureCredential

    return ChainedTokenCredential(AzureCliCredential(), DefaultAzureCredential())


def _stored(blob: Any) -> StoredFile:
    return StoredFile(blob.name, blob.size, int(blob.last_modified.timestamp()) * 10**9, blob.etag)


@contextmanager
def _errors() -> Iterator[None]:
    from azure.core.exceptions import (
        AzureError,
        ClientAuthenticationError,
        HttpResponseError,
        ResourceModifiedError,
        ResourceNotFoundError,
    )

    try:
        yield
    except ResourceNotFoundError as problem:
        raise FileNotFoundError(problem.message) from problem
    except ResourceModifiedError as problem:
        raise Changed from problem
    except ClientAuthenticationError as problem:
        raise PermissionError(problem.message) from problem
    except HttpResponseError as problem:
        again = problem.status_code is None or problem.status_code in {408, 429} or problem.status_code >= 500
        raise (ConnectionError if again else PermissionError)(problem.message) from problem
    except AzureError as problem:
        raise ConnectionError(problem.message) from problem
    except ValueError as problem:  # of names and connection strings
        raise PermissionError(str(problem)) from problem
