"""YAML that others wrote: limits, and one message with the line."""

import contextlib
import time
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from llmtrain.config.load import load
from llmtrain.config.safe_yaml import MAX_BYTES, YAMLMistake, parse_yaml, read_yaml
from llmtrain.errors import UserError
from llmtrain.recipe.recipe import Recipe


class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


def bomb(first: str, begin: str, each: str, between: str, end: str) -> str:
    """Nine lines, each with ten of the line before (`OLD`): 10^9 values."""
    lines = [f"NEW: {begin}{between.join([each] * 10)}{end}".replace("OLD", f"a{n - 1}") for n in range(1, 9)]
    numbered = [line.replace("NEW", f"a{n}").replace("#", str(n)) for n, line in enumerate(lines, start=1)]
    return "\n".join([f"a0: {first}", *numbered, ""])


LISTS = bomb("[x]", "[", '"${OLD}"', ", ", "]")
TEXTS = bomb("lol", "", "${OLD}", "", "")
BLOCKS = bomb("{b: 1}", "{b: [", '"${OLD}"', ", ", "]}")
MERGED = bomb("&a0 {}", "&a#\n  <<: [", "*OLD", ", ", "]")
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(8)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"x\.yaml:\d+: it unfolds to more than"),
        ("a: &a\n  b: *a\n", r"unfolds to more than|found undefined alias|recursi"),
        ("a: 1\nb: 2\na: 3\n", r"x\.yaml:3: `a` is written twice in one block, first in line 1"),
        ("a:\n  - b: 1\n    b: 2\n", r"x\.yaml:3: `b` is written twice"),
        ("a: !!python/object/apply:os.system [x]\n", r"x\.yaml:1: not valid YAML: a tag, which is not read"),
        ("a: !function x.f\n", r"x\.yaml:1: not valid YAML: a tag"),
        ("[" * 5000, r"x\.yaml:1: nested more than 100 levels"),
        ("a: [1\nb: 2\n", r"x\.yaml:2: not valid YAML"),
        ("a: 2025-13-45\n", r"x\.yaml: not valid YAML"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(YAMLMistake, match=message):
        parse_yaml(text, "x.yaml")


def test_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("base: &b {x: 1, y: 2}\nc:\n  <<: *b\n  x: 3\nd: [*b, *b]\n")
    assert read_yaml(file) == {"base": {"x": 1, "y": 2}, "c": {"x": 3, "y": 2}, "d": [{"x": 1, "y": 2}] * 2}
    file.write_text("")
    assert read_yaml(file) is None
    file.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(YAMLMistake, match="is the most"):
        read_yaml(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(YAMLMistake, match="not UTF-8"):
        read_yaml(file)
    with pytest.raises(YAMLMistake, match="cannot be read"):
        read_yaml(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LISTS, "unfold to more than a recipe can be"),
        (TEXTS, "unfold to more than a recipe can be"),
        (BLOCKS, "unfold to more than a recipe can be"),
        (MERGED, "unfolds to more than 10,000 values"),
        ("a: '" + "${" * 20_000 + "}" * 20_000 + "'\n", r"x\.yaml:1: 20,000 interpolations"),
        ("a: 1\nb: 1" + ":1" * 100_000 + "\n", r"x\.yaml:2: A number of 200,001 characters"),
        ("a: 0x" + "f" * 10_000 + "\n", "A number of 10,002 characters"),
        ("a: !!bool maybe\n", "a value is none of its kind"),
        ("a: !!timestamp maybe\n", "a value is none of its kind"),
    ],
    ids=["lists", "texts", "blocks", "merged", "nested", "base 60", "base 16", "bool", "time"],
)
def test_recipes_that_would_take_minutes_and_memory(text: str, message: str, tmp_path: Path) -> None:
    """Interpolations are aliases of another kind: OmegaConf follows them without a limit."""
    file = tmp_path / "x.yaml"
    file.write_text(text)
    started = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        load(file, Recipe)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    "text",
    [
        "a: 1" + ":1" * 100_000,
        "a: " + "9" * 5000,
        "a: !!bool maybe",
        "a: !!timestamp maybe",
        "a: 1" + ":1" * 40 + ".5e9",
    ],
)
def test_values_that_are_none(text: str) -> None:
    with contextlib.suppress(YAMLMistake):
        parse_yaml(text, "x.yaml")


def test_interpolations_that_are_no_bomb(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: {b: [1, '${c}'], d: '${..c}-${c}'}\nc: x\ne: ${a}\nf: ${e.b}\ng: '${a.${h}}'\nh: d\n")
    data = load(file, Anything).model_dump()
    assert data["e"] == data["a"] == {"b": [1, "x"], "d": "x-x"}
    assert (data["f"], data["g"]) == ([1, "x"], "x-x")


@pytest.mark.parametrize(
    "text", [LAUGHS, "a: " + "[" * 5000, "a: &a {b: *a}\n", "a: ${oc.env:HOME}\n", "a: ${${b}:x}\n"]
)
def test_recipes_have_the_same_limits(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(file, Recipe)
    assert len(str(caught.value)) < 5000


def test_a_value_of_the_environment_is_not_taken_even_to_complain_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNREMARKABLE", "planted value")
    file = tmp_path / "x.yaml"
    file.write_text("variables: {a: '${oc.env:UNREMARKABLE}'}\nseed: ${variables.a}\n")
    with pytest.raises(UserError) as caught:
        load(file, Recipe)
    assert "planted value" not in str(caught.value)
