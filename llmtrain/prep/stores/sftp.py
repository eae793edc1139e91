"""An SFTP server."""

import io
import os
import re
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmtrain.prep.stores.store import Changed, StoredFile

_REQUEST = 1 << 18  # bytes
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.llmtrain")


class SftpStore:
    """A server, as Streaming's downloader reaches it.

    Keys come from the SSH agent, `~/.ssh`, or the file that `COMPOSER_SFTP_KEY_FILE` names; the server's own key must
    be in `~/.ssh/known_hosts`, or in the file that `COMPOSER_SFTP_KNOWN_HOSTS_FILE` names. One connection a process;
    one that broke is made again by the next call.
    """

    def __init__(self, place: str) -> None:
        self._url = urlsplit(f"sftp://{place}")
        if not self._url.hostname:
            raise PermissionError("expected sftp://[USER@]HOST[:PORT]/PATH")
        self._lock = threading.RLock()
        self._ssh: Any = None
        self._sftp: Any = None
        self._reading: tuple[str, str, Any] | None = None  # path, version, open file
        self._folders: set[str] = set()  # that are known to be there

    def stat(self, path: str) -> StoredFile:
        """See `Store`."""
        with self._connected() as sftp:
            found = sftp.stat(f"/{path}")
        if stat.S_ISDIR(found.st_mode or 0):
            raise FileNotFoundError(f"/{path} is a folder")
        return _stored(path, found)

    def files(self, prefix: str, depth: int | None = None) -> Iterator[StoredFile]:
        """See `Store`. Links to folders are not followed, as they may lead in a circle."""
        folder = prefix.rpartition("/")[0]
        with self._connected() as sftp:
            entries = sftp.listdir_attr(f"/{folder}")
        for entry in sorted(entries, key=lambda entry: str(entry.filename)):
            path = f"{folder}/{entry.filename}".lstrip("/")
            if not path.startswith(prefix) or _TEMPORARY.fullmatch(entry.filename):
                continue
            if stat.S_ISLNK(entry.st_mode or 0):
                try:
                    yield self.stat(path)
                except (FileNotFoundError, PermissionError):
                    continue
            elif stat.S_ISDIR(entry.st_mode or 0):
                if depth is None or depth > 0:
                    try:
                        yield from self.files(f"{path}/", None if depth is None else depth - 1)
                    except FileNotFoundError:  # deleted meanwhile
                        continue
            else:
                yield _stored(path, entry)

    def read(self, file: StoredFile, start: int, length: int) -> bytes:
        """See `Store`."""
        with self._connected() as sftp:
            if self._reading is None or self._reading[:2] != (file.path, file.version):
                self._stop_reading()
                opened = sftp.open(f"/{file.path}", "rb", bufsize=0)
                # One request at a time, of as much as OpenSSH gives at once: a read through paramiko's way to send
                # several ahead (`readv`) was seen to stand still until the channel's timeout.
                opened.MAX_REQUEST_SIZE = _REQUEST
                self._reading = file.path, file.version, opened
                if _stored(file.path, opened.stat()).version != file.version:
                    self._stop_reading()
                    raise Changed
            opened = self._reading[2]
            opened.seek(start)
            data = bytearray()
            while len(data) < length:
                some = opened.read(min(_REQUEST, length - len(data)))
                if not some:
                    raise ConnectionError("the server sent less than it has")
                data += some
        return bytes(data)

    def put(self, path: str, content: bytes | Path, sent: Callable[[int], None] | None = None) -> None:
        """See `Store`: under a temporary name, and then renamed."""
        folder, _, name = path.rpartition("/")
        temporary = f"/{folder}/.{name}.{uuid.uuid4().hex}.llmtrain"
        source = content.open("rb") if isinstance(content, Path) else io.BytesIO(content)
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        with source, self._connected() as sftp:
            self._make_folder(sftp, folder)
            try:
                # It compares the size afterwards.
                sftp.putfo(source, temporary, size, _differences(sent) if sent is not None else None)
                self._rename(sftp, temporary, f"/{path}")
            except FileNotFoundError as problem:
                self._folders.clear()  # somebody has deleted one of them
                raise ConnectionError(str(problem)) from problem

    def remove(self, path: str) -> None:
        """See `Store`."""
        with self._connected() as sftp:
            self._remove(sftp, f"/{path}")

    def prune(self, folder: str, *, leftovers: bool = False) -> None:
        """See `Store`."""
        with self._connected() as sftp:
            self._folders.clear()
            self._prune(sftp, f"/{folder.strip('/')}", leftovers)

    def _prune(self, sftp: Any, folder: str, leftovers: bool) -> bool:
        """Whether the folder is gone."""
        left = 0
        try:
            entries = sftp.listdir_attr(folder)
        except FileNotFoundError:
            return True
        for entry in entries:
            path = f"{folder}/{entry.filename}"
            if stat.S_ISDIR(entry.st_mode or 0):
                left += not self._prune(sftp, path, leftovers)
            elif leftovers and _TEMPORARY.fullmatch(entry.filename):
                self._remove(sftp, path)
            else:
                left += 1
        if left:
            return False
        try:
            sftp.rmdir(folder)
        except OSError:  # somebody has put something in
            return False
        return True

    def _rename(self, sftp: Any, old: str, new: str) -> None:
        try:
            sftp.posix_rename(old, new)
        except OSError as problem:
            if "upported" not in str(problem):
                raise
            self._remove(sftp, new)  # servers without OpenSSH's extension cannot rename over a file
            sftp.rename(old, new)

    def _make_folder(self, sftp: Any, folder: str) -> None:
        parts = folder.split("/")
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[:end])
            if path in self._folders or not path:
                continue
            try:
                sftp.stat(f"/{path}")
            except FileNotFoundError:
                try:
                    sftp.mkdir(f"/{path}")
                except OSError:
                    sftp.stat(f"/{path}")  # fine when another process was faster
            self._folders.add(path)

    def _remove(self, sftp: Any, path: str) -> None:
        with suppress(FileNotFoundError):
            sftp.remove(path)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        from paramiko import AuthenticationException, BadHostKeyException, SSHException

        with self._lock:
            try:
                if self._sftp is None:
                    self._connect()
                yield self._sftp
            except (FileNotFoundError, PermissionError, Changed):
                raise
            except (AuthenticationException, BadHostKeyException) as problem:
                self._disconnect()
                raise PermissionError(str(problem)) from problem
            except (SSHException, EOFError, OSError) as problem:
                self._disconnect()
                raise ConnectionError(str(problem) or type(problem).__name__) from problem

    def _connect(self) -> None:
        from paramiko import SSHClient

        ssh = SSHClient()
        ssh.load_system_host_keys(os.environ.get("COMPOSER_SFTP_KNOWN_HOSTS_FILE"))
        ssh.set_missing_host_key_policy(_OnlyKnownHosts())
        try:
            ssh.connect(
                self._url.hostname,
                port=self._url.port or 22,
                username=self._url.username,
                password=self._url.password,
                key_filename=os.environ.get("COMPOSER_SFTP_KEY_FILE"),
                timeout=15,
                banner_timeout=30,
                auth_timeout=30,
            )
            transport = ssh.get_transport()
            assert transport is not None
            transport.set_keepalive(30)
            sftp = ssh.open_sftp()
            channel = sftp.get_channel()
            assert channel is not None
            channel.settimeout(60)
        except BaseException:
            ssh.close()
            raise
        self._ssh, self._sftp = ssh, sftp

    def _disconnect(self) -> None:
        self._reading = None
        self._folders.clear()
        ssh, self._ssh, self._sftp = self._ssh, None, None
        if ssh is not None:
            ssh.close()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading[2].close()
            self._reading = None


def _differences(sent: Callable[[int], None]) -> Callable[[int, int], None]:
    """As paramiko wants it: told how many bytes have gone in all."""
    before = 0

    def progress(done: int, _size: int) -> None:
        nonlocal before
        sent(done - before)
        before = done

    return progress


class _OnlyKnownHosts:
    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        raise PermissionError(
            f"{hostname} is not in known_hosts. Its key is {key.get_name()} {key.fingerprint}: compare that with the "
            "server's, then connect to it once with ssh, or add it with ssh-keyscan"
        )


def _stored(path: str, found: Any) -> StoredFile:
    return StoredFile(path, found.st_size or 0, (found.st_mtime or 0) * 10**9, f"{found.st_size} {found.st_mtime}")
