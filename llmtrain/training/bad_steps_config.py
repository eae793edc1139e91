"""The recipe's block `bad_steps`: what happens when a loss or gradient is not finite, and when the loss jumps."""

from typing import Literal

from pydantic import Field, PositiveInt

from llmtrain.config.base import Config


class NonFiniteConfig(Config):
    """A loss or gradient that is inf or NaN. The update is never applied."""

    action: Literal["stop", "skip"] = "stop"
    """`stop` the run with a report, or `skip` the step: the weights stay, the data goes on."""
    max_skipped: PositiveInt = 10
    """With `skip`: after so many skipped steps in the run, the next one stops it."""


class LossSpikeConfig(Config):
    """A loss far above the median of the last steps."""

    action: Literal["stop", "skip", "rewind"] = "rewind"
    """`rewind` continues from the last checkpoint before the spike, and leaves out the updates around it."""
    window: PositiveInt = 100
    """Steps that the median is taken over; nothing is a spike before there are so many."""
    threshold: float = Field(default=3.0, gt=0)
    """How far above the median: in units of 1.4826 times the median absolute deviation of the window, but at least
    this percentage of the median."""
    patience: PositiveInt = 1
    """Steps in a row above the threshold that make a spike."""
    skip_before: int = Field(default=0, ge=0)
    """With `rewind`: steps before the spike whose updates are left out as well."""
    skip_after: int = Field(default=0, ge=0)
    """With `rewind`: steps after it."""
    max_rewinds: PositiveInt = 3
    """After so many rewinds or skips in the run, the next spike stops it."""


class BadStepsConfig(Config):
    """Steps that would harm the weights."""

    non_finite: NonFiniteConfig = NonFiniteConfig()
    """inf and NaN."""
    loss_spike: LossSpikeConfig | None = None
    """Jumps of the loss; not looked for when left out."""
