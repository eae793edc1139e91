"""Storages on this machine's loopback, and a connection that breaks."""

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 endpoint (moto's) that forgets everything at the end; yields its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


class SftpServer(NamedTuple):
    """A server that runs."""

    port: int
    key: str
    """Public, as known_hosts has it."""

    def known_at(self, *ports: int) -> str:
        """Content of a known_hosts file, for these ports of 127.0.0.1."""
        return "".join(f"[127.0.0.1]:{port} {self.key}\n" for port in ports)


@contextmanager
def sftp_server(root: Path) -> Iterator[SftpServer]:
    """An SFTP server (paramiko's) for the user `me` with the password `s3cret`; clients see `root` as `/`."""
    import paramiko

    key = paramiko.ECDSAKey.generate()
    listener = socket.create_server(("127.0.0.1", 0))
    transports: list[Any] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transports.append(transport)
            transport.add_server_key(key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _files_below(root))
            with suppress(paramiko.SSHException, EOFError):
                transport.start_server(server=_password_only(), event=threading.Event())

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield SftpServer(listener.getsockname()[1], f"{key.get_name()} {key.get_base64()}")
    finally:
        listener.close()
        for transport in transports:
            transport.close()


class CuttingProxy:
    """Passes TCP connections on to a server, and cuts some of them.

    Args:
        target: port on the loopback.
        every: cut each `every`-th connection: 1 all of them, 3 the third, sixth, ...; 0 none.
        after: bytes that pass, both ways together, before the connection is cut.
        reset: cut with a reset; otherwise as if the other side had finished.
    """

    def __init__(self, target: int, *, every: int, after: int, reset: bool = True) -> None:
        self.every, self.after, self.reset = every, after, reset
        self.connections = self.cuts = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "CuttingProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def down(self) -> None:
        """Cuts all connections, and from now on each new one with its first byte; `every = 0` is the end of it.

        A socket that is only closed while a thread reads from it stays open for the other side: that would be a server
        that swallows what it is sent, and not one that is down.
        """
        self.every, self.after = 1, 1
        for end in list(self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __exit__(self, *problem: object) -> None:
        self._listener.close()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self.connections += 1
            self._sockets += [client, server]
            _Passage(self, client, server, bool(self.every) and self.connections % self.every == 0).start()


class _Passage:
    """One connection."""

    def __init__(self, proxy: CuttingProxy, client: socket.socket, server: socket.socket, to_be_cut: bool) -> None:
        self._proxy, self._ends = proxy, (client, server)
        self._left = proxy.after if to_be_cut else None
        self._lock = threading.Lock()

    def start(self) -> None:
        client, server = self._ends
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 14):
                with self._lock:
                    allowed = len(data) if self._left is None else min(len(data), self._left)
                    sink.sendall(data[:allowed])
                    if self._left is not None:
                        self._left -= allowed
                        if self._left == 0:
                            self._cut()
                            return
            sink.shutdown(socket.SHUT_WR)

    def _cut(self) -> None:
        self._proxy.cuts += 1
        for end in self._ends:
            if self._proxy.reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _password_only() -> Any:
    import paramiko

    class Server(paramiko.ServerInterface):  # type: ignore[misc]
        def check_auth_password(self, username: str, password: str) -> int:
            right = (username, password) == ("me", "s3cret")
            return int(paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED)

        def get_allowed_auths(self, username: str) -> str:
            return "password"

        def check_channel_request(self, kind: str, chanid: int) -> int:
            return int(paramiko.OPEN_SUCCEEDED)

    return Server()


def _files_below(root: Path) -> Any:
    import paramiko

    class Files(paramiko.SFTPServerInterface):  # type: ignore[misc]
        def list_folder(self, path: str) -> Any:
            return self._tried(
                lambda: [
                    paramiko.SFTPAttributes.from_stat(entry.lstat(), entry.name) for entry in self._at(path).iterdir()
                ]
            )

        def stat(self, path: str) -> Any:
            return self._tried(lambda: paramiko.SFTPAttributes.from_stat(self._at(path).stat()))

        def lstat(self, path: str) -> Any:
            return self._tried(lambda: paramiko.SFTPAttributes.from_stat(self._at(path).lstat()))

        def open(self, path: str, flags: int, attr: Any) -> Any:
            def opened() -> Any:
                mode = "r+b" if flags & (os.O_WRONLY | os.O_RDWR) else "rb"
                file = os.fdopen(os.open(self._at(path), flags, 0o644), mode, buffering=0)
                handle = paramiko.SFTPHandle(flags)
                handle.readfile = handle.writefile = file
                handle.stat = lambda: paramiko.SFTPAttributes.from_stat(os.fstat(file.fileno()))
                return handle

            return self._tried(opened)

        def remove(self, path: str) -> Any:
            return self._done(lambda: self._at(path).unlink())

        def rename(self, oldpath: str, newpath: str) -> Any:
            if self._at(newpath).exists():
                return paramiko.SFTP_FAILURE
            return self._done(lambda: self._at(oldpath).rename(self._at(newpath)))

        def posix_rename(self, oldpath: str, newpath: str) -> Any:
            return self._done(lambda: self._at(oldpath).replace(self._at(newpath)))

        def mkdir(self, path: str, attr: Any) -> Any:
            return self._done(lambda: self._at(path).mkdir())

        def rmdir(self, path: str) -> Any:
            return self._done(lambda: self._at(path).rmdir())

        def _at(self, path: str) -> Path:
            return root / str(self.canonicalize(path)).lstrip("/")

        def _tried(self, action: Any) -> Any:
            try:
                return action()
            except OSError as problem:
                return paramiko.SFTPServer.convert_errno(problem.errno)

        def _done(self, action: Any) -> Any:
            result = self._tried(action)
            return result if isinstance(result, int) else paramiko.SFTP_OK

    return Files
