"""The recipe's block `watchdog`: when a step is a hang, and how often slow ranks are looked for."""

from pydantic import Field, PositiveInt

from llmtrain.config.base import Config


class WatchdogConfig(Config):
    """Says which rank a run waits for, and ends a run that hangs."""

    step_limit: float | None = Field(default=None, gt=0)
    """Seconds that a step, or a batch of an evaluation, may take. Null: twenty times the median of the last ones, but
    not less than 50 (600 with `compile_config`), and `dist_timeout` before there are three. Whatever else a run
    does (starting, saving, exporting) may take `dist_timeout`."""
    heart_limit: float = Field(default=40.0, ge=5)
    """Seconds without a sign of life after which a rank that the others wait for counts as lost."""
    report_interval: PositiveInt = 100
    """Steps between two looks at how long ranks compute and how long they wait for data."""
    slow_factor: float = Field(default=1.5, gt=1)
    """A rank is reported as slow when it computes so many times longer than the median rank."""
