"""The questions of a task, as they stand in its file: one JSON object a line, in llm-foundry's format."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError
from llmtrain.evaluation.icl.config import ICLTaskConfig
from llmtrain.foreign_datasets import load_dataset
from llmtrain.json_text import parse_json

KEYS: Mapping[str, Mapping[str, type]] = {
    "language_modeling": {"context": str, "continuation": str},
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "generation_task_with_answers": {"context": str, "answer": str},
}
"""What a row must have, by the type of the task."""

OPTIONAL: Mapping[str, type] = {"aliases": list, "chain_of_thought": str}
"""What a row of generation_task_with_answers may have."""

_NAMES = {str: "a text", list: "a list of texts", int: "a number (counted from 0)"}


@dataclass(frozen=True)
class Row:
    """One question."""

    place: str
    """File and line, for messages."""
    values: Mapping[str, Any]
    """By key; texts without blanks around them, as llm-foundry strips them (the texts in lists it leaves alone)."""

    def text(self, key: str) -> str:
        """A text."""
        return str(self.values.get(key, ""))

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        return list(self.values.get(key) or ())

    @property
    def gold(self) -> int:
        """Which of the choices is right."""
        return int(self.values["gold"])


def read_rows(task: ICLTaskConfig) -> list[Row]:
    """All questions of a task.

    Raises:
        UserError: there is no such file, or a row is not what the task's type needs: file, line, key.
    """
    rows = [Row(place, _checked(task, place, values)) for place, values in _objects(task)]
    if not rows:
        raise UserError(f"icl_tasks {task.label}: {task.dataset_uri} has no questions.")
    return rows


def by_category(task: ICLTaskConfig, rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each category, in the order of names; one category `""` where the task has none."""
    if not task.has_categories:
        return {"": rows}
    parts: dict[str, list[Row]] = {}
    for row in rows:
        category = row.values.get("category")
        if not isinstance(category, str) or not category:
            raise UserError(f"{row.place}: no `category`, and task {task.label} has `has_categories: true`.")
        parts.setdefault(category, []).append(row)
    return dict(sorted(parts.items()))


def _objects(task: ICLTaskConfig) -> Iterator[tuple[str, Any]]:
    if task.dataset_uri.startswith("hf://"):
        yield from _of_the_hub(task)
        return
    path = Path(task.dataset_uri).expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    try:
                        yield place, parse_json(line)
                    except ValueError as error:
                        raise UserError(f"{place}: not JSON ({error}). Each line is one object.") from None
    except FileNotFoundError:
        raise UserError(
            f"icl_tasks {task.label}: dataset_uri: there is no file {path}"
            f"{'' if path.is_absolute() else f' (from {Path.cwd()})'}. llm-foundry's files are not shipped: "
            "give the path of your copy."
        ) from None
    except IsADirectoryError:
        raise UserError(f"icl_tasks {task.label}: dataset_uri: {path} is a folder; give a jsonl file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"icl_tasks {task.label}: {path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"icl_tasks {task.label}: {path} cannot be read: {error.strerror}.") from None


def _of_the_hub(task: ICLTaskConfig) -> Iterator[tuple[str, Any]]:
    name = task.dataset_uri.removeprefix("hf://")
    try:
        found = load_dataset(name, **task.hf_loading_vars)
    except UserError as error:
        raise UserError(f"icl_tasks {task.label}: dataset_uri: {error}") from None
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"icl_tasks {task.label}: dataset_uri: {name} cannot be loaded: {first}") from error
    if isinstance(found, dict):
        raise UserError(
            f"icl_tasks {task.label}: {name} has splits {', '.join(map(str, found))}. Choose: hf_loading_vars: "
            "{split: ...}."
        )
    for number, row in enumerate(found):
        place = f"{name}, row {number}"
        if missing := [c for columns in task.hf_parsing_map.values() for c in columns if c not in row]:
            raise UserError(f"{place}: no column `{missing[0]}`; there are {', '.join(row)} (hf_parsing_map).")
        joined = {key: " ".join(str(row[c]) for c in columns) for key, columns in task.hf_parsing_map.items()}
        yield place, joined or dict(row)


def _checked(task: ICLTaskConfig, place: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"{place}: expected an object, found {type(values).__name__}.")
    kind, needed = task.icl_task_type, KEYS[task.icl_task_type]
    for key, wanted in needed.items():
        if values.get(key) is None:
            raise UserError(
                f"{place}: `{key}` is missing. A row of type {kind} has {', '.join(needed)}; this one has "
                f"{', '.join(map(str, values)) or 'nothing'}."
            )
        _check_type(place, key, values[key], wanted)
    if kind == "generation_task_with_answers":
        for key, wanted in OPTIONAL.items():
            if values.get(key) is not None:
                _check_type(place, key, values[key], wanted)
    if "gold" in needed:
        choices = values["choices" if kind == "multiple_choice" else "context_options"]
        if len(choices) < 2:
            raise UserError(f"{place}: {len(choices)} choice; at least two are needed.")
        if not 0 <= values["gold"] < len(choices):
            raise UserError(f"{place}: `gold` is {values['gold']}, and there are {len(choices)} choices (0 first).")
    return {key: value.strip() if isinstance(value, str) else value for key, value in values.items()}


def _check_type(place: str, key: str, value: Any, wanted: type) -> None:
    fits = isinstance(value, wanted) and not isinstance(value, bool)
    if not fits or (wanted is list and not all(isinstance(item, str) for item in value)):
        raise UserError(f"{place}: `{key}` is {value!r:.60}; expected {_NAMES[wanted]}.")
