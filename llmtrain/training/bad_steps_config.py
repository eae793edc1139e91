"""The recipe's block `bad_steps`: what happens when a loss or gradient is not finite, and when the loss jumps."""

from typing import Literal

from pydantic import Field, PositiveInt

from llmtrain.config.base import Config


class NonFiniteConfig(Config):
    """A loss or gradient that is inf or NaN. The update is never applied."""

    action: Literal["stop", "skip"] = "stop"
    """`stop` the run with a report, or `skip` the step: the weights stay, the data goes on. Weights that are not finite
    before the step stop the run in both cases."""
    max_skipped: PositiveInt = 10
    """With `skip`: after so many skipped steps in the run, the next one stops it."""


class LossSpikeConfig(Config):
    """A loss far above the median of the last steps."""

    action: Literal["stop", "skip", "rewind"] = "rewind"
    """`skip` the step that is one; or `rewind`: continue from the newest checkpoint before the spike, and leave out
    the updates around it; or `stop` the run. In all cases the step's own update is not applied."""
    window: int = Field(default=100, ge=4)
    """Steps that the median is taken over, without those above the threshold; nothing is a spike before there are so
    many."""
    threshold: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    """How far above the median: in units of 1.4826 times the median absolute deviation of the window, but at least
    this percentage of the median."""
    patience: PositiveInt = 1
    """Steps in a row above the threshold that make a spike; the updates of those before the last are applied."""
    skip_before: int = Field(default=2, ge=0)
    """With `rewind`: steps before the spike whose updates are left out as well. The loss of a step is that of the
    weights that the steps before it have made; with 0 (and `patience` 1) `skip` gives the same weights sooner."""
    skip_after: int = Field(default=2, ge=0)
    """With `rewind`: steps after it whose updates are left out as well."""
    max_rewinds: PositiveInt = 3
    """After so many rewinds (or, with `skip`, skipped steps) in the run, the next spike stops it."""


class BadStepsConfig(Config):
    """Steps that would harm the weights."""

    non_finite: NonFiniteConfig = NonFiniteConfig()
    """inf and NaN."""
    loss_spike: LossSpikeConfig | None = None
    """Jumps of the loss; not looked for when left out."""
