"""A file in a store, read like a file on this machine."""

import io
from concurrent.futures import Future, ThreadPoolExecutor

from llmtrain.errors import UserError
from llmtrain.prep.stores.retry import persistently
from llmtrain.prep.stores.store import Changed, Store, StoredFile
from llmtrain.redaction import without_password

SMALLEST, LARGEST = 1 << 16, 1 << 22  # bytes of a request


class RemoteFile(io.RawIOBase):
    """Reads in requests that grow while the file is read on and on, and then one ahead of what was asked for.

    A request that fails is repeated from the byte at which it broke, and for fewer bytes.

    Raises, while reading:
        UserError: the storage failed too often, or the file was changed meanwhile.
    """

    def __init__(self, store: Store, file: StoredFile, url: str) -> None:
        self._store, self._file, self._url = store, file, url
        self._position = 0
        self._start, self._data = 0, b""  # what is here
        self._length = SMALLEST
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[bytes]] | None = None

    @property
    def mtime(self) -> int:
        """When it was last changed, in nanoseconds; 0 where the storage does not say."""
        return self._file.mtime

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def close(self) -> None:  # noqa: D102
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer as far as the data goes that is here, or that the next request brings."""
        if self._position >= self._file.size or not len(buffer):
            return 0
        if not self._start <= self._position < self._start + len(self._data):
            self._load(len(buffer))
        offset = self._position - self._start
        n = min(len(buffer), len(self._data) - offset)
        buffer[:n] = memoryview(self._data)[offset : offset + n]
        self._position += n
        return n

    def _load(self, wanted: int) -> None:
        end = self._start + len(self._data)
        goes_on = self._position == end and end > 0
        if self._ahead is not None and self._ahead[0] == self._position:
            data = self._ahead[1].result()
        else:
            if not goes_on:
                self._length = SMALLEST
            data = self._fetch(self._position, min(LARGEST, max(wanted, self._length)))
        self._start, self._data, self._ahead = self._position, data, None
        if goes_on:
            self._length = min(LARGEST, self._length * 2)
            after = self._start + len(data)
            if after < self._file.size and not self.closed:
                self._thread = self._thread or ThreadPoolExecutor(1, "read-ahead")
                self._ahead = (after, self._thread.submit(self._fetch, after, self._length))

    def _fetch(self, start: int, length: int) -> bytes:
        length = min(length, self._file.size - start)

        def attempt() -> bytes:
            nonlocal length
            try:
                return self._store.read(self._file, start, length)
            except OSError:
                length = max(1, min(length, max(SMALLEST, length // 2)))
                raise

        try:
            return persistently(attempt, f"reading {self._url} at byte {start:,}")
        except (Changed, FileNotFoundError) as problem:
            raise UserError(
                f"{without_password(self._url)} was changed or deleted while it was being read: run the command again"
            ) from problem
