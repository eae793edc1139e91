"""The base class of every config."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """A typed, frozen piece of a recipe; an unknown key is an error.

    The string below each field of a subclass is its documentation: it becomes the description in the JSON Schema, and
    its first sentence stands in error messages.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    ADVICE: ClassVar[Mapping[str, str]] = {}
    """What to say about a key that does not exist here: key -> sentence.

    On the root of a schema the keys are `fnmatch` patterns over the whole dotted path (``*.alibi``), or over
    a path and a value that is not one of the allowed ones (``model.name=gpt2``).
    """


def mistake(message: str, key: str = "") -> PydanticCustomError:
    """An error to raise in a validator when the blame lies with one key below the validated block.

    Args:
        message: One sentence or two: what is wrong and what to write instead.
        key: Dotted path of the key, relative to the validated block; the message then carries that key's line.
    """
    context: dict[str, Any] = {"message": message, "key": key}
    return PydanticCustomError("mistake", "{message}", context)
