"""Blocks such as `callbacks:`, where each key names a component and its value holds the component's settings."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from llmtrain.config.base import Config


class NamedBlocks(Config):
    """One optional field per known name; a component is on when its name is written.

    `lr_monitor:`, `lr_monitor: {}` and `lr_monitor: true` all switch it on with its defaults; `lr_monitor: false`
    switches it off again, which is how an override removes what a file has.
    """

    @model_validator(mode="before")
    @classmethod
    def _written_means_on(cls, data: Any) -> Any:
        if data is None:
            return {}
        if not isinstance(data, Mapping):
            return data
        return {
            name: {} if block is None or block is True else block for name, block in data.items() if block is not False
        }

    @model_serializer(mode="wrap")
    def _only_what_is_on(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: block for name, block in handler(self).items() if block is not None}

    def switched_on(self) -> Iterator[tuple[str, Config]]:
        """The names that are on and their settings, in the order of the fields."""
        for name in type(self).model_fields:
            block = getattr(self, name)
            if block is not None:
                yield name, block
