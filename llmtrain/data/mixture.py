"""A mixture in a file of its own, for several recipes: what `streams` may name instead of listing them."""

from typing import Self

from pydantic import model_validator

from llmtrain.config.base import Config
from llmtrain.config.load import load
from llmtrain.data.config import StreamConfig, check_weights


class Mixture(Config):
    """Streams by name, as they may stand under `dataset.streams`; `llmtrain prep` writes such a file."""

    streams: dict[str, StreamConfig]
    """The streams."""

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        check_weights(self.streams)
        return self


def read_mixture(path: str) -> dict[str, StreamConfig]:
    """Read a mixture. Relative paths in it count from the working directory, as in a recipe.

    Raises:
        ConfigError: With every mistake in it and its line.
    """
    return load(path, Mixture).streams
