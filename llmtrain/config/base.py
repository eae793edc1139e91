"""The base class of every config."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A typed, frozen piece of a recipe; an unknown key is an error.

    The string below each field of a subclass is its documentation: it becomes the description in the JSON Schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
