"""Which of this machine's addresses the other hosts see, and a port that is free."""

import socket

import psutil  # type: ignore[import-untyped]


def address_towards(host: str, port: int) -> str | None:
    """The address of this machine in packets to `host`; None when nothing leads there, or it has no such name.

    A machine's own name often leads elsewhere (127.0.1.1 on Debian, the wrong one of two networks), and torchrun and
    gloo tell it to the other hosts. Nothing is sent.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None


def is_own(host: str) -> bool:
    """Whether `host` names this machine."""
    try:
        theirs = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(theirs & _own_addresses().keys())


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None for loopback."""
    name = _own_addresses().get(address)
    return None if name is None or name.startswith("lo") else name


def free_port() -> int:
    """A port that nobody uses just now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


def _own_addresses() -> dict[str, str]:
    """Address -> interface."""
    internet = (socket.AF_INET, socket.AF_INET6)
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in internet
    }
