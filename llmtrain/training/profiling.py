"""Composer's profiler, from the recipe's `profiler` block."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.recipe.recipe import ProfilerConfig

if TYPE_CHECKING:
    from composer.profiler import Profiler


def build_profiler(cfg: ProfilerConfig | None, folder: Path) -> "Profiler | None":
    """The profiler, with its traces in `folder`; None when the recipe has none."""
    if cfg is None:
        return None
    from composer.profiler import JSONTraceHandler, Profiler, cyclic_schedule

    settings = cfg.model_dump(exclude={"schedule", "json_trace_handler"})
    settings["torch_prof_folder"] = settings["torch_prof_folder"] or str(folder / "torch_profiles")
    handler = {"folder": str(folder / "traces"), **cfg.json_trace_handler}
    return Profiler(
        schedule=cyclic_schedule(**cfg.schedule.model_dump()),
        trace_handlers=[JSONTraceHandler(**handler)],
        **settings,
    )
