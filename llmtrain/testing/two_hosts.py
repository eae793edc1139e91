"""Two hosts on one machine: network namespaces with an address each, joined by a cable that can be pulled.

Each has shared memory (/dev/shm) of its own, too, and half of the cores, so that a rank on each computes with as many
threads as two ranks on this machine do; disks are shared, as a cluster's are. And each start there has a boot id of its
own: what a rank looks up about processes of its machine is not known of those on the other host. Needs root and `ip`.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil  # type: ignore[import-untyped]

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_OWN_MACHINE = (
    f'mount -t tmpfs tmpfs /dev/shm && echo "$0" > /dev/shm/boot && mount --bind /dev/shm/boot {_BOOT_ID} '
    '&& rm /dev/shm/boot && exec "$@"'
)


@dataclass(frozen=True)
class Host:
    """One of the two.

    Attributes:
        namespace: its name for `ip netns`.
        interface: of its end of the cable.
        address: how the other one reaches it.
        cores: those of this machine that are its own.
    """

    namespace: str
    interface: str
    address: str
    cores: tuple[int, ...]

    def start(self, command: Sequence[str], *, cwd: Path, log: Path, env: Mapping[str, str]) -> "HostProcess":
        """Starts a command there; both of its outputs are appended to `log`."""
        cores = ",".join(map(str, self.cores))
        inside = ["taskset", "--cpu-list", cores, "ip", "netns", "exec", self.namespace]
        inside += ["unshare", "--mount", "sh", "-c", _OWN_MACHINE, str(uuid.uuid4())]
        with log.open("a") as output:
            return HostProcess([*inside, *command], cwd, output, env)


class HostProcess:
    """A command on a host, with all that it starts.

    Args:
        command: whole.
        cwd: working directory.
        output: where both of its outputs go.
        env: its variables.
    """

    def __init__(self, command: Sequence[str], cwd: Path, output: IO[Any], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )

    def wait(self, timeout: float) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def below(self) -> list[psutil.Process]:
        """What it has started, and what that has started, and so on."""
        try:
            found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return found

    def lose(self, unplug: Callable[[], None] | None = None) -> None:
        """The host is gone: all of its processes are killed at once, and none can say goodbye.

        Args:
            unplug: called before they are killed. Else the kernel closes their connections for them, as it does when
                a host goes down in order; with the cable pulled first nobody is told, as when the power fails.
        """
        family = [psutil.Process(self.process.pid), *self.below()] if self.process.poll() is None else self.below()
        for process in family:  # nobody may notice the end of another and act on it
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        if unplug is not None:
            unplug()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


class TwoHosts:
    """The pair.

    Args:
        first: where the rendezvous is.
        second: the other one.
    """

    def __init__(self, first: Host, second: Host) -> None:
        self.first = first
        self.second = second

    def unplug(self) -> None:
        """Pulls the cable: packets are lost in both directions and nobody is told."""
        _ip("-n", self.first.namespace, "link", "set", self.first.interface, "down")

    def plug(self) -> None:
        """Puts it back."""
        _ip("-n", self.first.namespace, "link", "set", self.first.interface, "up")


def why_not() -> str | None:
    """Why this machine cannot have them; None if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "unshare", "taskset", "sh") if shutil.which(name) is None]:
        return f"there is no `{missing[0]}`"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {(error.stderr or b'').decode(errors='replace').strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Makes them, and takes them away with all that runs there.

    Raises:
        subprocess.CalledProcessError: this machine does not allow it.
    """
    name = f"llmtrain-{secrets.token_hex(3)}"
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    parts = (tuple(cores[:half]), tuple(cores[-half:]))
    hosts = [Host(f"{name}-{end}", f"llm{end}", f"10.213.7.{end}", parts[end - 1]) for end in (1, 2)]
    first, second = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        # Made inside: the names of the interfaces are nobody else's there.
        cable = ["type", "veth", "peer", "name", second.interface, "netns", second.namespace]
        _ip("-n", first.namespace, "link", "add", first.interface, *cable)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", host.interface, "up")
        yield TwoHosts(first, second)
    finally:
        for host in hosts:
            _end_all_in(host.namespace)
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)


def _end_all_in(namespace: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
