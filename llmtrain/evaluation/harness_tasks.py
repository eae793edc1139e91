"""Tasks of lm-evaluation-harness by name, by tag, or from YAML files. Imports the harness (extra `eval`)."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from llmtrain.errors import UserError
from llmtrain.evaluation.harness_config import HarnessConfig, HarnessTask
from llmtrain.evaluation.harness_model import SEED
from llmtrain.evaluation.harness_trust import check_files, code_runs_with_trust_only
from llmtrain.trust import require

Spec = str | dict[str, Any]
"""What the harness loads: a name, or what a YAML file says."""


class Tasks:
    """Finds and loads tasks; they are loaded before the first is computed.

    Attributes:
        specs: each task of the config, with what the harness loads for it: several where a folder was named.
        notes: what was asked for and has no effect.

    Args:
        config: which tasks, and folders with more.

    Raises:
        UserError: there is no such task, or a file is none.
    """

    def __init__(self, config: HarnessConfig) -> None:
        self._config = config
        self.notes: list[str] = []
        for folder in config.include_path:
            if not Path(folder).is_dir():
                raise UserError(f"include_path {folder}: no such folder")
            check_files("harness.include_path", sorted(Path(folder).rglob("*.yaml")))
        self.specs = [(task, spec) for task in config.tasks for spec in _specs(task.task)]
        named = [name for _, spec in self.specs for name in _names(spec)]
        folders = [str(Path(folder).expanduser()) for folder in config.include_path] or None
        self._manager = TaskManager(include_path=folders, include_defaults=False)
        if not set(named) <= set(self._manager.all_tasks):  # the harness's own: thousands of files, ten seconds
            self._manager = TaskManager(include_path=folders)
        for name in named:
            if name not in self._manager.all_tasks:
                raise UserError(_unknown(name, self._manager.all_tasks))

    def load(self, task: HarnessTask, spec: Spec) -> dict[str, Any]:
        """What the harness's `evaluate` takes as `task_dict`, with the few-shot numbers and seeds set.

        Raises:
            UserError: its data is not here and cannot be fetched, or its definition is broken.
        """
        name = name_of(spec)
        try:
            with code_runs_with_trust_only(name):
                loaded = _load(self._manager, spec)
        except UserError:
            raise
        except Exception as problem:  # datasets, hubs, templates and functions of tasks raise what they like
            raise UserError(_not_loaded(name, problem)) from problem
        wanted = self._config.num_fewshot if task.num_fewshot is None else task.num_fewshot
        for leaf in leaves(loaded):
            if getattr(leaf, "UNSAFE_CODE", False) and not self._config.confirm_run_unsafe_code:
                raise UserError(
                    f"{name}: runs code that the model writes. Set harness.confirm_run_unsafe_code: true where that "
                    "can do no harm (a container without network and secrets)"
                )
            if getattr(leaf, "UNSAFE_CODE", False):
                require("harness.confirm_run_unsafe_code", name, what="code that the model writes")
            own = leaf.get_config("num_fewshot")
            if wanted and own == 0:  # the harness's own rule
                self.notes.append(f"{leaf.config.task}: says num_fewshot: 0 itself and keeps it, not {wanted}")
            elif wanted is not None and own != 0:
                leaf.set_config(key="num_fewshot", value=wanted)
            elif own is None:
                leaf.set_config(key="num_fewshot", value=0)
            leaf.set_fewshot_seed(seed=SEED)
            if self._config.gen_kwargs and leaf.get_config("output_type") == "generate_until":
                leaf.set_config(key="generation_kwargs", value=dict(self._config.gen_kwargs), update=True)
        return loaded


def name_of(spec: Spec) -> str:
    """Of the task or group."""
    return spec if isinstance(spec, str) else str(spec.get("group", spec.get("task")))


def _names(spec: Spec) -> list[str]:
    """The tasks and groups that are asked for by name."""
    if isinstance(spec, str):
        return [spec]
    members = spec["task"] if "group" in spec and isinstance(spec.get("task"), list) else []
    return [member for member in members if isinstance(member, str)]


def leaves(loaded: Mapping[Any, Any]) -> Iterator[Any]:
    """The tasks in what was loaded, groups resolved."""
    for value in loaded["tasks"].values() if "tasks" in loaded else loaded.values():
        if isinstance(value, dict):  # before version 0.4.12 groups are nested
            yield from leaves(value)
        else:
            yield value


def _load(manager: Any, spec: Spec) -> dict[str, Any]:
    if hasattr(manager, "load"):
        found: dict[str, Any] = manager.load([spec])
        return found
    if isinstance(spec, str):  # before version 0.4.12
        found = manager.load_task_or_group([spec])
        return found
    found = manager.load_config(dict(spec))
    for name, leaf in found.items():
        if isinstance(name, str):  # the name was taken out of the config
            leaf.config.task = name
    return found


def _specs(name: str) -> list[Spec]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = [spec for file in sorted(path.rglob("*.yaml")) if (spec := _read(file)) is not None]
        if not found:
            raise UserError(f"{name}: no YAML file in this folder defines a task (`task: NAME`)")
        return list(found)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{name}: no such file")
        spec = _read(path)
        if spec is None:
            raise UserError(f"{name}: defines no task. It needs `task: NAME`, or `group: NAME` with a list of tasks")
        return [spec]
    return [name]


def _read(file: Path) -> dict[str, Any] | None:
    """What a file says, with paths of its data made absolute; None where it is none of a task (a template, say)."""
    check_files("harness.tasks", [file])
    try:
        spec = _yaml(file)
    except Exception as problem:  # yaml's, and those of code that `!function` names
        raise UserError(f"{file}: is not a task that the harness can read: {_first_line(problem)}") from problem
    if not ("group" in spec or isinstance(spec.get("task"), str)):
        return None
    kwargs = spec.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        spec["dataset_kwargs"] = {**kwargs, "data_files": _beside(kwargs["data_files"], file.parent)}
    return spec


def _yaml(file: Path) -> dict[str, Any]:
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError:  # before version 0.4.12
        from lm_eval.utils import load_yaml_config

        return dict(load_yaml_config(str(file), mode="full"))
    return dict(load_yaml(file, resolve_func=True))


def _beside(files: Any, folder: Path) -> Any:
    """Relative paths of data mean the folder of the task's file, where they are there."""
    if isinstance(files, dict):
        return {split: _beside(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    return str((folder / files).resolve()) if "://" not in files and (folder / files).is_file() else files


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"{name}: the harness has no such task, group or tag.{hint} `lm_eval ls tasks` lists them; own tasks are named "
        "by the path of their YAML file, or found in include_path"
    )


def _not_loaded(name: str, problem: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    missing = isinstance(problem, OSError | DatasetNotFoundError) or "offline" in str(problem).lower()
    if not missing:
        return f"{name}: this task cannot be loaded: {type(problem).__name__}: {_first_line(problem)}"
    return (
        f"{name}: the data of this task is not on this machine and could not be fetched ({_first_line(problem)}). Run "
        "it once where there is a network and copy the folder HF_HOME from there; or define the task on local files (a "
        "YAML file with dataset_path: json)"
    )


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(problem).__name__
