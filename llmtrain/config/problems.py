"""Mistakes in a recipe as text: where it is, what stands there, what was expected, what to write instead."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmtrain.config.base import Config
from llmtrain.config.positions import COMMAND_LINE, Path, Position, Positions, dotted, lookup
from llmtrain.config.schema_keys import branches, descend, fields_of, models_at, models_in, name_of, places_of
from llmtrain.errors import UserError
from llmtrain.redaction import redact

ABSENT = object()
"""The value of a key that is not there."""


@dataclass(frozen=True)
class Problem:
    """One mistake. `text` is one or more sentences; `value` is what was written, or `ABSENT`."""

    position: Position
    path: Path
    text: str
    value: object = ABSENT

    def __str__(self) -> str:
        head = dotted(self.path)
        if not head:
            return f"{self.position}: {self.text}"
        if self.value is not ABSENT:
            equals = "=" if self.position == COMMAND_LINE else ": "
            head += f"{equals}{_shown(self.value, self.path[-1])}"
        return f"{self.position}: {head}\n    {self.text}"


class ConfigError(UserError):
    """Everything that is wrong with a recipe, in one block."""

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.problems = tuple(sorted(problems, key=_place))
        if len(problems) == 1 and not problems[0].path:
            super().__init__(str(problems[0]))
            return
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


def _place(problem: Problem) -> tuple[int, Path]:
    """Sorts the lines of the file first, then what is missing in it, then the command line."""
    position = problem.position
    return (position.line or (10**9 + (position == COMMAND_LINE)), problem.path)


def explain(error: ValidationError, schema: type[BaseModel], data: Any, positions: Positions) -> list[Problem]:
    """Turn pydantic's errors into problems.

    Args:
        error: What `schema.model_validate(data)` raised.
        schema: The root config class.
        data: The plain data that was validated.
        positions: Where its keys were written.
    """
    found: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_yaml_path(detail, data), []).append(detail)
    problems = []
    for path, details in found.items():
        if _is_consequence(path, details, found):
            continue
        texts = dict.fromkeys(text for detail in details for text in [_text(detail, path, schema, data)] if text)
        try:
            value = lookup(data, path) if path else ABSENT
        except KeyError:
            value = ABSENT
        problems.append(Problem(positions.of(path), path, _one_of(list(texts)), value))
    return problems


def _yaml_path(detail: ErrorDetails, data: Any) -> Path:
    """Pydantic's location without the names of union members, which are not in the file."""
    path: list[str] = []
    loc = list(detail["loc"])
    for index, step in enumerate(loc):
        in_list = isinstance(data, (list, tuple)) and isinstance(step, int) and step < len(data)
        if in_list or (isinstance(data, Mapping) and step in data):
            path, data = [*path, str(step)], data[step]
        elif index == len(loc) - 1 and detail["type"] == "missing":
            path.append(str(step))
    if detail["type"] == "mistake":
        for key in filter(None, detail["ctx"]["key"].split(".")):
            if not (key.isdigit() and isinstance(data, Mapping)):  # a single block where a list may stand
                path, data = [*path, key], descend(data, key)
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found") and isinstance(data, Mapping):
        path.append("name")
    return tuple(path)


def _is_consequence(path: Path, details: list[ErrorDetails], found: Mapping[Path, list[ErrorDetails]]) -> bool:
    """Errors that only follow from another one and would bury it."""
    # A wrong `name` decides which keys are legal beside it: name first, the rest on the next try.
    if path and path[-1] != "name" and all(detail["type"] in ("extra_forbidden", "missing") for detail in details):
        for end in range(len(path)):
            named = found.get((*path[:end], "name"), [])
            if any(detail["type"] in ("literal_error", "union_tag_invalid") for detail in named):
                return True
    # A union of a block and something else: the block was meant when one of its keys is at fault.
    deeper = [other for other in found if len(other) > len(path) and other[: len(path)] == path]
    return bool(deeper) and all(detail["type"].endswith("_type") or detail["type"] == "missing" for detail in details)


_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys",
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number less than {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} item(s)",
    "too_long": "at most {max_length} item(s)",
    "string_too_short": "text of at least {min_length} character(s)",
    "none_required": "nothing (null)",
}


def _text(detail: ErrorDetails, path: Path, schema: type[BaseModel], data: Any) -> str:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return _unknown_key(path, schema, data)
    if kind == "missing" and path[-1].isdigit():
        return "The list has too few items."
    if kind == "missing":
        return f"This key is required. {_expectation(path, schema, data)}".strip()
    if kind == "mistake":
        return str(context["message"])
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"]))
    if kind in ("literal_error", "enum", "union_tag_invalid", "union_tag_not_found"):
        return _choice(path, schema, data, given)
    expected = _EXPECTED.get(kind)
    if expected is None:
        return f"{detail['msg']}. {_about(path, schema, data)}".strip()
    text = f"Expected {expected.format(**context)}."
    if kind == "string_type" and isinstance(given, (int, float)):
        text = f"Expected text: put it in quotes ('{given}')."
    elif given is None:
        text = f"Nothing stands here. Expected {expected.format(**context)}."
    return f"{text} {_about(path, schema, data)}".strip()


def _unknown_key(path: Path, schema: type[BaseModel], data: Any) -> str:
    key, block = path[-1], path[:-1]
    models = models_at(schema, block, data)
    for model in models:
        if issubclass(model, Config) and key in model.ADVICE:
            return model.ADVICE[key]
    advice = _advice(schema, dotted(path))
    if advice:
        return advice
    known = [name for model in models for name in fields_of(model)]
    names: list[Any] = [model.model_fields["name"].annotation for model in models if "name" in model.model_fields]
    kind = get_args(names[0])[0] if len(names) == 1 and get_origin(names[0]) is Literal else None
    owner = f"`{dotted(block)}` with `name: {kind}`" if kind else f"`{dotted(block)}`"
    text = f"{owner} has no key `{key}`." if block else f"There is no key `{key}`."
    if "." in key:
        return f"{text} Write it nested: `{key.split('.')[0]}:` and the rest indented below it."
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if close:
        return f"{text} Did you mean `{close[0]}`?"
    # The key of a sibling (another optimizer's, say) has this very path: to point at it would help nobody.
    places = [place for place in places_of(schema, key) if dotted(place) != dotted(path)]
    places.sort(key=lambda place: (place[0] != path[0], len(place)))
    if places and key not in ("name", "kwargs"):
        where = " or ".join(f"`{dotted(place)}`" for place in places[:3])
        return f"{text} It belongs in {where}."
    if not block:
        text += " Values of your own, for interpolation, go under `variables`."
    return f"{text} Known here: {', '.join(sorted(dict.fromkeys(known)))}."


def _advice(schema: type[BaseModel], text: str) -> str:
    if issubclass(schema, Config):
        for pattern, advice in schema.ADVICE.items():
            if fnmatch(text, pattern):
                return advice
    return ""


def _choice(path: Path, schema: type[BaseModel], data: Any, given: Any) -> str:
    allowed = [str(choice) for choice in _choices(path, schema, data)]
    if isinstance(given, Mapping):  # pydantic blames the block; `path` ends in the key that chooses
        required = "" if path[-1] in given else "This key is required. "
        slips = difflib.get_close_matches(path[-1], map(str, given), n=1, cutoff=0.6) if required else []
        if slips:
            required = f"This key is required; `{slips[0]}` is not a key here. "
        given = given.get(path[-1])
    else:
        required = ""
    advice = _advice(schema, f"{dotted(path)}={given}")
    if advice:
        return advice
    choices = ", ".join(f"`{choice}`" for choice in allowed)
    text = (
        f"Expected {'one of ' if len(allowed) > 1 else ''}{choices}." if allowed else "Not one of the allowed values."
    )
    close = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.6)
    if not close and isinstance(given, str) and len(given) > 2:
        close = [choice for choice in allowed if given.lower() in choice.lower()]
    if close and len(allowed) > 1:
        text += f" Did you mean `{close[0]}`?"
    return f"{required}{text} {_about(path, schema, data)}".strip()


def _choices(path: Path, schema: type[BaseModel], data: Any) -> Iterator[Any]:
    seen = []
    for model in models_at(schema, path[:-1], data):
        info = fields_of(model).get(path[-1])
        members = name_of(model) if path[-1] == "name" else ()
        for member in members or (branches(info.annotation) if info is not None else ()):
            values = [member] if members else get_args(member) if get_origin(member) is Literal else []
            seen += [value for value in values if value not in seen]
    yield from seen


def _expectation(path: Path, schema: type[BaseModel], data: Any) -> str:
    """What to write for a missing key: the choices of a union, and the key's documentation."""
    for model in models_at(schema, path[:-1], data):
        info = fields_of(model).get(path[-1])
        if info is not None:
            names = [name for member in models_in(info.annotation) for name in name_of(member)]
            if names:
                return f"{_about(path, schema, data)} Its `name` is one of {', '.join(f'`{name}`' for name in names)}."
    if path[-1] == "name":
        return _choice(path, schema, data, None)
    return _about(path, schema, data)


def _about(path: Path, schema: type[BaseModel], data: Any) -> str:
    """The first sentence of the documentation of the key."""
    for model in models_at(schema, path[:-1], data) if path else []:
        info = fields_of(model).get(path[-1])
        if info is not None and info.description:
            paragraph = " ".join(info.description.split("\n\n")[0].split())
            sentence = paragraph.split(". ")[0].rstrip(".")
            return f"(`{path[-1]}`: {sentence}.)" if len(sentence) <= 120 else ""
    return ""


def _one_of(texts: list[str]) -> str:
    """Alternatives of an undecided union, as one sentence."""
    start = "Expected "
    if len(texts) > 1 and all(text.startswith(start) for text in texts):
        heads = [text.removeprefix(start).split(". ")[0].rstrip(".") for text in texts]
        tail = texts[0].partition(". ")[2]
        return f"{start}{' or '.join(dict.fromkeys(heads))}. {tail}".strip()
    return " ".join(texts)


def _shown(value: object, key: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, value))}}}" if len(value) < 6 else f"{{... {len(value)} keys}}"
    text = str(redact(value, key))
    return text if len(text) <= 80 else f"{text[:77]}..."
