"""`pii`: e-mail addresses, IP addresses and telephone numbers become placeholders.

datatrove's PIIFormatter is not used: it takes its replacements in turn from a list, so that a text comes out
differently by what came before it; it does not count; it knows neither IPv6 nor telephones; and its IPv4 pattern has no
boundaries, so that it replaces a part of `1.10.1.2.33.4`.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator

from llmtrain.prep.stages.config import Pii
from llmtrain.prep.stages.step import Change, Step, Verdict, around

# Every repetition is bounded and begins at a boundary: no text takes time beyond its length.
_LOCAL = r"A-Za-z0-9._%+'-"
_EMAIL = re.compile(
    rf"(?<![A-Za-z0-9_])[A-Za-z0-9_][{_LOCAL}]{{0,63}}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?\.){{1,8}}"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")
_PHONE = re.compile(
    r"(?<![\w+.-])(?:"
    r"\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # +49 30 1234567, +1 (212) 555-0123
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}"  # (212) 555-0123, 212-555-0123
    r")(?![\w-]|\.\d)"
)


def pii(config: Pii) -> Step:
    """Replaces each thing that is found by its placeholder, and counts them by kind."""
    kinds = [kind for kind in _FINDERS if kind in config.kinds]  # in an order that does not depend on the recipe's

    def scrub(text: str) -> Verdict:
        counts: dict[str, int] = {}
        excerpt, changed = "", text
        for kind in kinds:
            pieces, end = [], 0
            for start, stop in _FINDERS[kind](changed):
                excerpt = excerpt or around(changed, start, stop)
                pieces += [changed[end:start], getattr(config, kind)]
                counts[kind] = counts.get(kind, 0) + 1
                end = stop
            if pieces:
                changed = "".join([*pieces, changed[end:]])
        return Change(changed, counts, excerpt) if counts else None

    return scrub


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" in text:
        yield from (match.span() for match in _EMAIL.finditer(text))


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    spans = [match.span() for match in _IPV4.finditer(text) if _is_global(match[0])]
    if ":" in text:
        spans += [match.span() for match in _IPV6.finditer(text) if _is_global(match[0])]
    yield from sorted(spans)


def _is_global(address: str) -> bool:
    """Whether this is an address that is routed on the internet: not private, reserved, or no address at all."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _phones(text: str) -> Iterator[tuple[int, int]]:
    yield from (match.span() for match in _PHONE.finditer(text))


_FINDERS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "email": _emails,
    "ip": _addresses,
    "phone": _phones,
}
