"""Keeping passwords, keys and tokens out of whatever is printed, logged or written. Light.

A secret is known in three ways: by the name of the key that it stands under (`api_key`), by where it stands in a URL
(`user:password@`, `?sig=`), and by its value, where the environment holds it under a name that says so (WANDB_API_KEY).
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO
from urllib.parse import quote

MASK = "***"
SHORTEST = 8
"""Values of environment variables with fewer characters are not searched for: too many words contain them."""

_SECRET_KEY = re.compile(
    r"(^|[_\-.])((api|access|account|private|signing|storage)[_\-]?key|secret([_\-]?key)?|password|passwd|passphrase|"
    r"credentials?|connection[_\-]?string|authorization|bearer|(?P<token>token))$",
    re.I,
)
_NEW_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_TEXT_TOKEN = re.compile(
    r"(^|_)(eos|bos|pad|unk|sep|cls|mask|eot|eod|eoi|boi|prefix|suffix|middle|stop|image|audio|video|special|extra)"
    r"_token$",
    re.I,
)
"""Keys of a tokenizer that end in `token`, and mean a piece of text."""

_SECRET_VARIABLE = re.compile(
    r"(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|PASS|API_?KEY|ACCESS_?KEY(_ID)?|ACCOUNT_?KEY|STORAGE_?KEY|"
    r"PRIVATE_?KEY|SECRET_?KEY|SECRET_ACCESS_KEY|CONNECTION_STRING|CREDENTIALS?|SAS|SAS_TOKEN|AUTH)$",
    re.I,
)
_PATHS = re.compile(r"CREDENTIALS?$", re.I)
"""Variables of those that mostly hold a path."""
_PASSWORD = r":(?!\d*(?:/|$))(?:[^/\s'\"<>]+|[^\s@'\"<>]+)@"
"""With an `@` or a slash in it, too, which nobody has escaped; a port and a path with an `@` are none."""
_USER_IN_URL = re.compile(rf"(?<=://)(?:[^/\s@'\"<>?#:\[]+{_PASSWORD}|[^/\s'\"<>?#]+@)")
_PASSWORD_IN_URL = re.compile(rf"(\w+://[^:/@\s\[]+){_PASSWORD}")
_SIGNATURE = re.compile(
    r"(?<=[?&;])((?:sig|signature|x-amz-signature|x-amz-security-token|x-amz-credential|x-goog-signature|"
    r"x-goog-credential|awsaccesskeyid|googleaccessid|[\w\-]*(?:token|password|passwd|secret|api_?key))=)[^&\s'\"<>#]+",
    re.I,
)
_ASSIGNMENT = re.compile(r"(?P<key>[\w.\-\[\]]+)(?P<equals>=)(?P<value>\S.*)", re.S)


def redact(value: Any, key: str = "") -> Any:
    """A copy of plain data without secrets: each is replaced by `***`.

    Args:
        value: what a recipe, a JSON file or a logger holds.
        key: the key that it stands under.
    """
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        return MASK if value and names_a_secret(key) else redact_text(value)
    if isinstance(value, int) and not isinstance(value, bool) and names_a_secret(key):
        return MASK  # a password of digits, which YAML takes for a number
    return value


def redact_text(text: str) -> str:
    """Text without users and signatures in URLs, and without the values of secret environment variables."""
    for secret in _known():
        if secret in text:
            text = text.replace(secret, MASK)
    if "://" in text:
        text = _USER_IN_URL.sub(f"{MASK}@", text)
        text = _SIGNATURE.sub(rf"\1{MASK}", text)
    return text


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command: `key=value` is judged by its key, too."""
    out = []
    for argument in arguments:
        found = _ASSIGNMENT.fullmatch(argument)
        if found is not None:
            argument = f"{found['key']}={_redact_value(found['value'], found['key'].rpartition('.')[2].lstrip('-'))}"
        out.append(redact_text(argument))
    return out


def _redact_value(value: str, key: str) -> str:
    """What stands behind `key=`, which is YAML and may have keys of its own."""
    if names_a_secret(key):
        return MASK
    if not any(sign in value for sign in "{:"):
        return value
    from llmtrain.config.safe_yaml import YAMLMistake, parse_yaml

    try:
        parsed = parse_yaml(value, key)
    except YAMLMistake:
        return value
    masked = redact(parsed)
    return value if masked == parsed or not isinstance(parsed, (dict, list)) else json.dumps(masked, ensure_ascii=False)


def redact_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of an environment, to be shown: judged by their names, as those of this process are."""
    return {
        name: MASK if value and (names_a_secret(name) or _is_secret(name, value)) else redact_text(value)
        for name, value in variables.items()
    }


def names_a_secret(key: str) -> bool:
    """Whether what stands under a key of that name is a secret."""
    key = _NEW_WORD.sub("_", key)  # accessToken
    found = _SECRET_KEY.search(key)
    return found is not None and not (found["token"] and _TEXT_TOKEN.search(key))


def without_password(text: str) -> str:
    """`scheme://user:password@host` without the password, for messages about a place: who is asked stays readable."""
    text = _PASSWORD_IN_URL.sub(rf"\1:{MASK}@", text)
    for secret in _known():
        text = text.replace(secret, MASK)
    return _SIGNATURE.sub(rf"\1{MASK}", text) if "://" in text else text


def without_masked(value: Any) -> Any:
    """Plain data without the keys whose secrets were replaced: what read them then looks where it looks by itself."""
    if isinstance(value, Mapping):
        return {key: without_masked(item) for key, item in value.items() if item != MASK}
    if isinstance(value, list):
        return [without_masked(item) for item in value]
    return value


_last: tuple[dict[str, str], tuple[str, ...]] = ({}, ())


def _known() -> tuple[str, ...]:
    """The secrets in the environment, and how they look inside a URL or JSON; the longest first."""
    global _last
    named = {name: value for name, value in os.environ.items() if len(value) >= SHORTEST and _is_secret(name, value)}
    if named != _last[0]:
        spelled = {spelling for value in named.values() for spelling in _spellings(value)}
        _last = named, tuple(sorted(spelled, key=len, reverse=True))
    return _last[1]


def _is_secret(name: str, value: str) -> bool:
    """By its name; a path is where a secret lies, and not the secret. Keys of AWS may begin with a slash, too."""
    if _SECRET_VARIABLE.search(name) is None:
        return False
    is_path = value.startswith(("/", "~/", "./"))
    return not (is_path and (_PATHS.search(name) is not None or os.path.exists(os.path.expanduser(value))))  # noqa: PTH110, PTH111  # not for each line a Path


def _spellings(value: str) -> Iterator[str]:
    yield value
    if "\n" in value:  # a key in PEM, printed line by line
        yield from (line for line in value.splitlines() if len(line) >= 2 * SHORTEST and not line.startswith("-----"))
    yield quote(value, safe="")
    yield json.dumps(value)[1:-1]
    yield repr(value)[1:-1]


class RedactedStream:
    """Standard output or standard error, without secrets in what is written to it.

    Args:
        stream: where it goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text without its secrets; the number of characters that were given."""
        self._stream.write(redact_text(text))
        return len(text)

    def __setattr__(self, name: str, value: Any) -> None:
        """Whoever puts a function in the place of `write` to listen (Composer's file logger, W&B) hears no secret."""
        if name == "write":
            listener = value
            value = lambda text: listener(redact_text(text))  # noqa: E731
        super().__setattr__(name, value)

    def writelines(self, lines: Any) -> None:
        """Writes each of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


class RedactedFormatter(logging.Formatter):
    """Lines of Python's loggers, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return redact_text(super().format(record))


def redact_output() -> None:
    """From now on nothing that this process prints holds a secret, the traceback that ends it included; idempotent."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            setattr(sys, name, RedactedStream(stream))
