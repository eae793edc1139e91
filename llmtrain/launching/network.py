"""Which of this machine's addresses the other hosts see, and a port that is free."""

import ipaddress
import socket

import psutil  # type: ignore[import-untyped]

_ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737): packets to it would take the way to everywhere."""


def address_for_others(host: str, port: int) -> str | None:
    """The address under which the other hosts reach this one; None when it cannot be found out.

    It is that of packets to `host`; but on `host` itself, whose own name often leads to 127.0.1.1 there, it is that of
    packets to anywhere else, or the only one.
    """
    address = address_towards(host, port)
    if address is None or not _is_loopback(address) or _is_loopback(host) or host == "localhost":
        return address
    if (outward := address_towards(_ELSEWHERE, 9)) is not None and not _is_loopback(outward):
        return outward
    others = [own for own in _own_addresses() if "." in own and not _is_loopback(own)]
    return others[0] if len(others) == 1 else None


def address_towards(host: str, port: int) -> str | None:
    """The address of this machine in packets to `host`; None when nothing leads there, or it has no such name.

    A machine's own name often leads elsewhere (127.0.1.1 on Debian, the wrong one of two networks), and torchrun and
    gloo tell it to the other hosts. Nothing is sent.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port or 9, type=socket.SOCK_DGRAM)
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
        theirs = {str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return False
    return any(map(_is_loopback, theirs)) or bool(theirs & _own_addresses().keys())


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None for loopback."""
    name = _own_addresses().get(address)
    return None if name is None or name.startswith("lo") else name


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:  # a name
        return False


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
