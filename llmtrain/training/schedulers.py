"""Learning-rate schedules: a factor on the optimizer's `lr` as a function of training time.

The configs are light; composer is imported when a schedule is built.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, field_validator

from llmtrain.config.base import Config
from llmtrain.config.durations import Duration, Span, parse

if TYPE_CHECKING:
    from composer.core import State, Time


class _WithWarmup(Config):
    t_warmup: Span
    """Warm-up: the factor rises from 0 in a straight line. `0.1dur`, or in the unit of `max_duration`."""
    t_max: Span = "1dur"
    """When the schedule ends; not before `max_duration`."""
    scale_warmup: bool = False
    """Whether a scale_schedule_ratio stretches the warm-up, too."""


class ConstantWithWarmup(_WithWarmup):
    """Warm-up, then `alpha`."""

    name: Literal["constant_with_warmup"]
    """Which schedule."""
    alpha: NonNegativeFloat = 1.0
    """Factor after the warm-up."""


class CosineWithWarmup(_WithWarmup):
    """Warm-up to 1, then alpha_f + (1 - alpha_f) * (1 + cos(pi * t)) / 2, with t from 0 to 1 after the warm-up."""

    name: Literal["cosine_with_warmup"]
    """Which schedule."""
    alpha_f: NonNegativeFloat = 0.0
    """Factor at the end."""


class LinearDecayWithWarmup(_WithWarmup):
    """Warm-up to `alpha_i`, then a straight line to `alpha_f`."""

    name: Literal["linear_decay_with_warmup"]
    """Which schedule."""
    alpha_i: NonNegativeFloat = 1.0
    """Factor after the warm-up."""
    alpha_f: NonNegativeFloat = 0.0
    """Factor at the end."""


class InvSqrtWithWarmup(Config):
    """Warm-up to 1, then 1 / sqrt((t - t_warmup) / t_scale + 1), and a linear cool-down to `alpha_f_cooldown`.

    The decay does not depend on the length of the run, so a run can be extended without a change of its past. The form
    is the one of Zhai et al. 2022 (arXiv:2106.04560, appendix: `rsqrt` with a time scale, and cool-down).
    """

    name: Literal["inv_sqrt_with_warmup"]
    """Which schedule."""
    t_warmup: Span
    """Warm-up, in the unit of `max_duration`."""
    t_scale: Span | None = None
    """Time scale of the decay, in the unit of `max_duration`; `t_warmup` when left out. After 3 of them the factor is
    a half."""
    t_cooldown: Span = "0ba"
    """Length of the cool-down at the end of the run, in the unit of `max_duration`; 0 is none."""
    t_max: Span = "1dur"
    """When the schedule ends."""
    alpha_f_decay: NonNegativeFloat = 0.0
    """The factor that an endless decay approaches."""
    alpha_f_cooldown: NonNegativeFloat = 0.0
    """Factor at the end of the cool-down."""
    scale_warmup: bool = False
    """Whether a scale_schedule_ratio stretches the warm-up, too."""

    @field_validator("t_warmup", "t_scale", "t_cooldown")
    @classmethod
    def _in_absolute_units(cls, value: str | None) -> str | None:
        if value is not None and parse(value).unit == "dur":
            raise ValueError(
                "This schedule does not depend on the length of the run, so `dur` cannot stand here. Use the unit of "
                "`max_duration`."
            )
        return value


SchedulerConfig = Annotated[
    ConstantWithWarmup | CosineWithWarmup | LinearDecayWithWarmup | InvSqrtWithWarmup, Field(discriminator="name")
]


def units_problem(cfg: SchedulerConfig, max_duration: str) -> tuple[str, str] | None:
    """The first key whose unit cannot be compared with `max_duration`, and a sentence about it; None when all fit.

    Composer finds this out at the first step, after everything was built.
    """
    run = parse(max_duration)
    for key in ("t_warmup", "t_max", "t_scale", "t_cooldown"):
        text = getattr(cfg, key, None)
        span = parse(text) if text is not None else None
        if span is None or _comparable(span, run) or span.value == 0:
            continue
        units = ["ba", "ep"] if run.unit in ("ba", "ep") else [run.unit]
        if key == "t_max" or not isinstance(cfg, InvSqrtWithWarmup):
            units.append("dur")
        allowed = " or ".join(f"`{unit}`" for unit in units)
        return key, f"`max_duration` is {max_duration}, so this must be in {allowed}."
    end = parse(cfg.t_max)
    if end.unit == run.unit and end.value < run.value:
        return "t_max", f"The run goes on to {max_duration}: give at least that, or leave the key out."
    if end.unit == "dur" and end.value < 1:
        return "t_max", "The schedule must cover the whole run: `1dur`, or leave the key out."
    return None


def _comparable(span: Duration, run: Duration) -> bool:
    return span.unit in ("dur", run.unit) or {span.unit, run.unit} <= {"ba", "ep"}


def build_scheduler(cfg: SchedulerConfig) -> Callable[..., float]:
    """A Composer scheduler: called with the trainer's state, it returns the factor on the learning rate."""
    from composer import optim

    if isinstance(cfg, InvSqrtWithWarmup):
        return InvSqrtSchedule(cfg)
    composers = {
        "constant_with_warmup": optim.ConstantWithWarmupScheduler,
        "cosine_with_warmup": optim.CosineAnnealingWithWarmupScheduler,
        "linear_decay_with_warmup": optim.LinearWithWarmupScheduler,
    }
    settings = cfg.model_dump(exclude={"name"})
    if parse(cfg.t_warmup).value == 0:  # a zero in any unit; Composer compares units before it looks at values
        settings["t_warmup"] = "0dur"
    schedule: Callable[..., float] = composers[cfg.name](**settings)
    return schedule


class InvSqrtSchedule:
    """`InvSqrtWithWarmup` as a Composer scheduler."""

    def __init__(self, cfg: InvSqrtWithWarmup) -> None:
        self.cfg = cfg

    def __call__(self, state: "State", ssr: float = 1.0) -> float:
        """The factor at the state's time.

        Args:
            state: Composer's state; `max_duration` and the timestamp are read.
            ssr: Composer's scale_schedule_ratio: stretches `t_max`, and the warm-up when `scale_warmup` says so.
        """
        cfg = self.cfg
        end = _resolve(cfg.t_max, state, ssr)
        unit = end.unit
        now = float(state.timestamp.get(unit).value)
        warmup = _value(cfg.t_warmup, state, unit, ssr if cfg.scale_warmup else 1.0)
        scale = warmup if cfg.t_scale is None else _value(cfg.t_scale, state, unit, 1.0)
        cooldown = _value(cfg.t_cooldown, state, unit, 1.0)
        return inv_sqrt(
            now,
            warmup=warmup,
            scale=scale,
            cooldown=cooldown,
            end=float(end.value),
            floor=cfg.alpha_f_decay,
            final=cfg.alpha_f_cooldown,
        )


def inv_sqrt(
    now: float, *, warmup: float, scale: float, cooldown: float, end: float, floor: float = 0.0, final: float = 0.0
) -> float:
    """Warm-up, inverse square root decay, linear cool-down. All times in one unit.

    Args:
        now: Time.
        warmup: Length of the linear rise from 0 to 1.
        scale: Time scale of the decay, above 0 unless there is no decay.
        cooldown: Length of the linear fall at the end.
        end: End of the run.
        floor: What the decay approaches.
        final: Factor at `end`, when there is a cool-down.
    """
    if now < warmup:
        return now / warmup

    def decay(time: float) -> float:
        return floor + (1.0 - floor) / math.sqrt((time - warmup) / max(scale, 1.0) + 1.0)

    start = max(end - cooldown, warmup)
    if cooldown <= 0 or now <= start:
        return decay(now)
    part = min((now - start) / max(end - start, 1e-12), 1.0)
    return decay(start) * (1.0 - part) + final * part


def _resolve(text: str, state: "State", ssr: float) -> "Time[Any]":
    """A span as Composer counts it: `dur` and epochs become the unit that the run counts in."""
    from composer.core import Time, TimeUnit

    span = parse(text)
    run = state.max_duration
    assert run is not None
    if span.unit == "dur":
        span, whole = Duration(span.value, "ep" if run.unit == TimeUnit.EPOCH else "ba"), run.value
        if run.unit != TimeUnit.EPOCH:
            return Time(int(span.value * whole), run.unit)
        span = Duration(span.value * whole, "ep")
    if span.unit == "ep":
        if state.dataloader_len is None:
            raise RuntimeError("epochs cannot be converted to batches: the loader does not know its length")
        return Time(int(span.value * int(state.dataloader_len) * ssr), TimeUnit.BATCH)
    return Time(int(span.value * ssr), TimeUnit(span.unit))


def _value(text: str, state: "State", unit: Any, ssr: float) -> float:
    span = _resolve(text, state, ssr)
    if span.value != 0 and span.unit != unit:
        raise ValueError(f"{text} cannot be compared with the run's length, which is in {unit}")
    return float(span.value)
