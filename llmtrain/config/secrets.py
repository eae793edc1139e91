"""Keeping passwords and tokens out of logs, checkpoints and error messages."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_?key|secret(_?key)?|password|passwd|passphrase|credentials?|token)$", re.I
)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")


def redact(value: Any, key: str = "") -> Any:
    """A copy of `value` without secrets: values under secret-looking keys and ``user:password@`` in URLs are masked."""
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        return MASK if value and _SECRET_KEY.search(key) else _USER_IN_URL.sub(f"{MASK}@", value)
    return value
