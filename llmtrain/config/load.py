"""A YAML file and `key=value` overrides become one validated config, or one readable list of mistakes."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    OmegaConfBaseException,
)
from pydantic import BaseModel, ValidationError

from llmtrain.config.interpolations import NO_RESOLVERS, Budget, without_resolvers
from llmtrain.config.positions import COMMAND_LINE, Duplicate, Path, Position, Positions, find_positions
from llmtrain.config.problems import ConfigError, Problem, explain
from llmtrain.config.safe_yaml import NOT_A_VALUE, YAMLMistake

T = TypeVar("T", bound=BaseModel)

MAX_BYTES = 1_000_000
"""A recipe is a page or two; anything larger is another kind of file."""


def load(
    path: str | FilePath,
    schema: type[T],
    overrides: Sequence[str] = (),
    *,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> T:
    """Read, merge, resolve, validate.

    Args:
        path: The YAML file.
        schema: The config class to build.
        overrides: `key=value` or `a.b[0].c=value`; the value is YAML. They win over the file.
        prepare: Changes the resolved plain data before validation (fan-out of one key into several). It must bear
            malformed data, which validation will then report.

    Raises:
        ConfigError: With every mistake that was found, each with its line, its value and what to write instead.
    """
    source = str(path)
    text = _read(FilePath(path))
    try:
        positions = find_positions(text, source)
        if positions.is_block and not positions.duplicates:
            document = OmegaConf.load(io.StringIO(text))
    except YAMLMistake as error:  # with its place
        place, _, text = str(error).rpartition(": ")
        line = place.rpartition(":")[2]
        position = Position(source, int(line) if line.isdigit() else None)
        text = f"Nested too deeply: {text}" if text.startswith("nested") else f"{text[:1].upper()}{text[1:]}"
        raise ConfigError(source, [Problem(position, (), text)]) from None
    except yaml.YAMLError as error:
        raise ConfigError(source, [_syntax_problem(error, source)]) from None
    except OmegaConfBaseException as error:  # an interpolation that is not well-formed
        where = _split(str(error.full_key or ""))
        raise ConfigError(source, [Problem(positions.of(where), where, _interpolation_text(error))]) from None
    except NOT_A_VALUE as error:
        text = (
            str(error) if isinstance(error, ValueError) else f"Not valid YAML: a value is none of its kind ({error})."
        )
        raise ConfigError(source, [Problem(Position(source), (), text)]) from None
    except RecursionError:
        text = "Nested too deeply, or an alias that holds itself."
        raise ConfigError(source, [Problem(Position(source), (), text)]) from None
    if positions.duplicates:
        raise ConfigError(source, [_twice(duplicate) for duplicate in positions.duplicates])
    if not positions.is_block:
        text = "Expected a block of keys (lines of `key: value`)."
        raise ConfigError(source, [Problem(Position(source, 1), (), text)])
    assert isinstance(document, DictConfig)

    problems = _apply(document, overrides, positions)
    data = _resolve(document, positions, problems)
    if prepare is not None:
        data = prepare(data)
    try:
        config = schema.model_validate(data)
    except ValidationError as error:
        known = {problem.path for problem in problems}
        problems += [found for found in explain(error, schema, data, positions) if found.path not in known]
    if problems:
        raise ConfigError(source, problems)
    return config


def _read(path: FilePath) -> str:
    try:
        size = path.stat().st_size
        if size <= MAX_BYTES:
            return path.read_text(encoding="utf-8")
        text = f"{size:,} bytes, and a recipe has at most {MAX_BYTES:,}. Is this the right file?"
    except FileNotFoundError:
        names = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        text = "There is no such file." + (f" In that folder: {', '.join(names[:12])}." if names else "")
    except IsADirectoryError:
        text = "This is a folder; give the YAML file in it."
    except UnicodeDecodeError as error:
        text = f"Not UTF-8 text (byte {error.start}). Is this a YAML file?"
    except OSError as error:
        text = f"Cannot be read: {error.strerror}."
    raise ConfigError(str(path), [Problem(Position(str(path)), (), text)])


def _twice(key: Duplicate) -> Problem:
    text = f"Written twice in one block, first in line {key.first.line}; YAML would drop one silently. Keep one."
    return Problem(key.second, key.path, text)


def _syntax_problem(error: yaml.YAMLError, source: str) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else None
        started = error.context_mark
        where = f" ({error.context} from line {started.line + 1})" if error.context and started is not None else ""
        text = f"Not valid YAML: {error.problem}{where}."
        if "'\\t'" in str(error.problem):
            text += " Indent with spaces, not tabs."
        return Problem(Position(source, line), (), text)
    return Problem(Position(source), (), f"Not valid YAML: {error}".splitlines()[0])


def _apply(document: DictConfig, overrides: Sequence[str], positions: Positions) -> list[Problem]:
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        path = _split(key)
        if not equals or not path:
            hint = f" Write `{key.lstrip('-')}=VALUE`." if key.startswith("-") else ""
            text = f"An override is written `key=value`, without blanks around `=`.{hint}"
            problems.append(Problem(COMMAND_LINE, (override,), text))
            continue
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
            assert isinstance(parsed, dict)
            OmegaConf.update(document, key, parsed["value"], merge=True, force_add=True)
        except yaml.YAMLError as error:
            problems.append(Problem(COMMAND_LINE, path, _syntax_problem(error, "").text, value))
        except (OmegaConfBaseException, IndexError, ValueError, TypeError, AttributeError) as error:
            problems.append(Problem(COMMAND_LINE, path, f"Cannot be set: {_first_line(error)}.", value))
        else:
            positions.override(path)
    return problems


def _split(key: str) -> Path:
    """``a.b[0].c`` -> (a, b, 0, c); empty when it is not a key."""
    parts = tuple(key.replace("[", ".").replace("]", "").split("."))
    return parts if all(part and not part.startswith("-") and " " not in part for part in parts) else ()


def _resolve(document: DictConfig, positions: Positions, problems: list[Problem]) -> dict[str, Any]:
    """The document as plain data, interpolations resolved; those that cannot be are reported and left as they are."""

    def plain(node: DictConfig | ListConfig, raw: Any, path: Path) -> Any:
        values: dict[Any, Any] = {}
        for key, written in raw.items() if isinstance(raw, dict) else enumerate(raw):
            here = (*path, str(key))
            if OmegaConf.is_missing(node, key):
                problems.append(
                    Problem(positions.of(here), here, "`???` stands for a value that you must give.", "???")
                )
                values[key] = written
                continue
            if here in called:
                values[key] = written
                continue
            try:
                value = node[key]
                if OmegaConf.is_config(value):
                    inside = OmegaConf.is_interpolation(node, key)
                    values[key] = budget.plain(value) if inside else plain(value, written, here)
                else:
                    values[key] = value
            except (OmegaConfBaseException, RecursionError) as error:
                problems.append(Problem(positions.of(here), here, _interpolation_text(error), written))
                values[key] = written
        return values if isinstance(raw, dict) else list(values.values())

    raw = OmegaConf.to_container(document, resolve=False)
    called = without_resolvers(document, raw, ())
    problems += [Problem(positions.of(path), path, NO_RESOLVERS, written) for path, written in called.items()]
    budget = Budget()
    with budget.watch():
        data = plain(document, raw, ())
    if budget.is_spent:  # one mistake, though each value after it could not be resolved either
        text = "Its interpolations (`${key}`) unfold to more than a recipe can be."
        raise ConfigError(positions.source, [Problem(Position(positions.source), (), text)])
    assert isinstance(data, dict)
    return data


def _interpolation_text(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "This interpolation leads back to itself."
    if isinstance(error, InterpolationKeyError):
        return f"{_first_line(error)}. `${{a.b}}` takes the value of key `a.b` of this file, counted from its top."
    if isinstance(error, GrammarParseError):
        return (
            f"Not a valid interpolation: {_first_line(error)}. Write `${{key}}`, or `\\${{...}}` for the text itself."
        )
    return f"Cannot be resolved: {_first_line(error)}."


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
