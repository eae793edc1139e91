"""S3 and what speaks its protocol."""

import base64
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.prep.stores.store import Changed, StoredFile

_ONE_REQUEST = 1 << 30  # larger files are uploaded in parts, and appear when the last one is there
PAGE = 1000  # files that are listed at a time
_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_FATAL = {"400", "401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"} | {
    "InvalidBucketName",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "InvalidRequest",
    "EntityTooLarge",
    "AllAccessDisabled",
    "AccountProblem",
}


class S3Store:
    """A bucket.

    Credentials, region and endpoint come from where boto3 takes them (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`,
    `AWS_ENDPOINT_URL`, a machine's role, ...); the endpoint also from Streaming's `S3_ENDPOINT_URL`. Without any
    credentials requests are not signed, as for public buckets.
    """

    def __init__(self, bucket: str, **client: Any) -> None:
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config

        session = Session()
        signed = client.get("aws_access_key_id") or session.get_credentials() is not None
        config = Config(
            connect_timeout=15,
            read_timeout=60,
            retries={"total_max_attempts": 1},  # `persistently` does that, for all storages alike
            # Uploads carry Content-MD5, which everything that speaks S3 checks; boto3's newer trailing checksums it
            # does not.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **({} if signed else {"signature_version": UNSIGNED}),
        )
        self._bucket = bucket
        payer = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
        self._extra = {"RequestPayer": "requester"} if bucket in [name.strip() for name in payer] else {}
        client.setdefault("endpoint_url", os.environ.get("S3_ENDPOINT_URL") or None)
        with _errors():
            self._client = session.client("s3", config=config, **client)

    def stat(self, path: str) -> StoredFile:
        """See `Store`."""
        with _errors():
            found = self._client.head_object(Bucket=self._bucket, Key=path, **self._extra)
        return _stored(path, found["ContentLength"], found)

    def files(self, prefix: str, depth: int | None = None) -> Iterator[StoredFile]:
        """See `Store`."""
        more: dict[str, str] = {}
        while True:
            with _errors():
                page = self._client.list_objects_v2(
                    Bucket=self._bucket, Prefix=prefix, MaxKeys=PAGE, **more, **self._extra
                )
            for entry in page.get("Contents", []):
                yield _stored(entry["Key"], entry["Size"], entry)
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def read(self, file: StoredFile, start: int, length: int) -> bytes:
        """See `Store`."""
        data = b""
        span = f"bytes={start}-{start + length - 1}"
        with _errors():
            body = self._client.get_object(
                Bucket=self._bucket, Key=file.path, Range=span, IfMatch=file.version, **self._extra
            )["Body"]
            parts: list[bytes] = []
            try:
                for part in body.iter_chunks(1 << 18):
                    parts.append(part)
            except Exception:
                if not parts:  # otherwise the caller goes on after what has arrived
                    raise
            finally:
                body.close()
            data = b"".join(parts)
        if not data:
            raise ConnectionError("the storage sent nothing")
        return data

    def put(self, path: str, content: bytes | Path, sent: Callable[[int], None] | None = None) -> None:
        """See `Store`."""
        with _errors():
            if isinstance(content, Path) and content.stat().st_size > _ONE_REQUEST:
                extra = self._extra or None
                self._client.upload_file(str(content), self._bucket, path, ExtraArgs=extra, Callback=sent)
            elif isinstance(content, Path):
                with _Watched(content, sent) as file:
                    digest = hashlib.file_digest(file, "md5").digest()
                    file.seek(0)
                    self._put(path, file, digest)
            else:
                self._put(path, content, hashlib.md5(content).digest())

    def remove(self, path: str) -> None:
        """See `Store`."""
        with _errors():
            self._client.delete_object(Bucket=self._bucket, Key=path, **self._extra)

    def prune(self, folder: str, *, leftovers: bool = False) -> None:
        """There are no folders."""

    def _put(self, path: str, body: Any, digest: bytes) -> None:
        md5 = base64.b64encode(digest).decode()
        self._client.put_object(Bucket=self._bucket, Key=path, Body=body, ContentMD5=md5, **self._extra)


class _Watched(io.FileIO):
    """A local file that tells how far it has been read: the second time, after its hash was computed."""

    def __init__(self, path: Path, sent: Callable[[int], None] | None) -> None:
        super().__init__(path, "rb")
        self._sent, self._furthest, self._hashed = sent, 0, False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._hashed = self._hashed or (self.tell() > 0 and offset == 0)
        return super().seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(-1 if size is None else size)
        if self._sent is not None and self._hashed and self.tell() > self._furthest:
            self._sent(self.tell() - self._furthest)
            self._furthest = self.tell()
        return data


def _stored(path: str, size: int, entry: dict[str, Any]) -> StoredFile:
    return StoredFile(path, size, int(entry["LastModified"].timestamp()) * 10**9, entry["ETag"])


@contextmanager
def _errors() -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
    )
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as problem:
        code = str(problem.response.get("Error", {}).get("Code", ""))
        status = str(problem.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        if status == "412" or code == "PreconditionFailed":
            raise Changed from problem
        if code in _MISSING or status == "404":
            raise FileNotFoundError(str(problem)) from problem
        if code in _FATAL or status in {"401", "403"}:
            raise PermissionError(str(problem)) from problem
        raise ConnectionError(str(problem)) from problem
    except (NoCredentialsError, PartialCredentialsError, ParamValidationError, ProfileNotFound, ValueError) as problem:
        raise PermissionError(str(problem)) from problem
    except (BotoCoreError, Boto3Error, HTTPError) as problem:
        raise ConnectionError(str(problem)) from problem
