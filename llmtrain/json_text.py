"""JSON that others wrote. Light."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, and what is nested so deeply that it gives up is a mistake like any other.

    Raises:
        ValueError: the text is no JSON, or thousands of brackets deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
