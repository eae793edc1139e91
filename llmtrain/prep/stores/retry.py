"""Trying again."""

import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from llmtrain.errors import UserError
from llmtrain.redaction import without_password

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds


def attempts() -> int:
    """How many times an operation is tried in all: `LLMTRAIN_STORAGE_ATTEMPTS`, 10 when not set (some two minutes)."""
    return max(1, int(os.environ.get("LLMTRAIN_STORAGE_ATTEMPTS", "10")))


def persistently(action: Callable[[], Result], doing: str, *, most: int | None = None) -> Result:
    """Carry something out, and again after a growing pause where the storage fails.

    Args:
        action: raises as the methods of `Store` do.
        doing: for messages: "reading s3://bucket/x".
        most: attempts in all, where they are to be fewer than usual.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it failed too often, or for a reason that stays.
    """
    most = min(attempts(), most) if most is not None else attempts()
    for attempt in range(1, most + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except PermissionError as problem:
            raise UserError(f"{without_password(doing)}: {reason(problem)}") from problem
        except (OSError, EOFError) as problem:
            if attempt == most:
                raise UserError(
                    f"{without_password(doing)} failed {most} times, the last time with: {reason(problem)}"
                ) from problem
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            log.info("%s: %s; attempt %d of %d", without_password(doing), reason(problem), attempt + 1, most)
            time.sleep(pause)
    raise AssertionError("unreachable")


def reason(problem: BaseException) -> str:
    """An exception in one line, without passwords."""
    text = str(problem).strip().replace("\n", " ")
    return without_password(text or type(problem).__name__)
