import contextlib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator, Field, model_validator

from llmtrain.config.base import Config, mistake
from llmtrain.config.load import MAX_BYTES, load
from llmtrain.config.named_blocks import NamedBlocks
from llmtrain.config.problems import ConfigError


class Adam(Config):
    name: Literal["adam"]
    lr: float = Field(gt=0)
    """Learning rate. More text."""
    betas: tuple[float, float] = (0.9, 0.99)


class Lion(Config):
    name: Literal["lion", "leo"]
    lr: float = 1.0
    momentum: float = 0.0


class Attention(Config):
    alibi: bool = False
    scale: float | Literal["auto"] = "auto"


class Model(Config):
    ADVICE: ClassVar[dict[str, str]] = {"rope": "There is no rope here."}

    width: int
    """Width of the model."""
    attention: Attention = Attention()

    @model_validator(mode="after")
    def _even(self) -> "Model":
        if self.width % 2:
            raise mistake("It must be even.", "width")
        return self


class Item(Config):
    label: str
    size: int = 1


class Switches(NamedBlocks):
    left: Attention | None = None
    right: Item | None = None


class Schema(Config):
    ADVICE: ClassVar = {"*.alibi": "It belongs in `model.attention.alibi`."}

    model: Model
    """The model."""
    optimizer: Annotated[Adam | Lion, Field(discriminator="name")] = Lion(name="lion")
    items: Annotated[
        tuple[Item, ...], BeforeValidator(lambda value: [value] if isinstance(value, dict) else value)
    ] = ()
    streams: dict[str, Item] = Field(default_factory=dict)
    switches: Switches = Switches()
    steps: int = 1
    """How many steps."""
    note: str = ""
    variables: dict[str, Any] = Field(default_factory=dict)


MODEL = "model: {width: 2}\n"


@pytest.fixture
def write(tmp_path: Path):
    def to_file(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return path

    return to_file


def mistakes(path: Path, *overrides: str) -> list[tuple[str, str]]:
    """Every problem as ('line:key' or '=key', text)."""
    with pytest.raises(ConfigError) as caught:
        load(path, Schema, overrides)
    found = []
    for problem in caught.value.problems:
        line = problem.position.line if problem.position.line is not None else "-"
        if problem.position.source == "command line":
            line = "="
        found.append((f"{line} {'.'.join(problem.path)}", problem.text))
    for _, text in found:  # the machinery does not show
        assert not any(
            noise in text for noise in ("pydantic", "http", "tagged-union", "Value error", "type=", "input_value")
        )
    return found


def test_file_overrides_and_interpolation_make_one_config(write) -> None:
    path = write(
        "variables: {w: 8}\nmodel:\n  width: ${variables.w}\noptimizer: {name: adam, lr: 1e-4, betas: ['0.5', 1e-1]}\n"
        "items: [{label: a}, {label: b}]\nnote: ${items[1].label}/${.steps}\nsteps: 3"
    )
    config = load(
        path, Schema, ["variables.w=10", "items[0].size=7", "model.attention={alibi: true}", "optimizer.lr=2e-5"]
    )
    assert config.model == Model(width=10, attention=Attention(alibi=True))
    assert config.optimizer == Adam(name="adam", lr=2e-5, betas=(0.5, 0.1))
    assert config.items == (Item(label="a", size=7), Item(label="b"))
    assert config.note == "b/3"


def test_a_number_that_yaml_takes_for_text_is_a_number(write) -> None:
    config = load(write(MODEL + "optimizer: {name: adam, lr: '1e-4'}\nsteps: '12'"), Schema)
    assert (config.optimizer.lr, config.steps) == (1e-4, 12)


def test_anchors_and_merges_keep_their_lines(write) -> None:
    path = write(
        "variables:\n  base: &base\n    label: a\n    size: big\n"
        "model: {width: 2}\nitems:\n  - <<: *base\n    label: c\n"
    )
    assert mistakes(path) == [("4 items.0.size", "Expected a whole number.")]


def test_all_mistakes_at_once_in_the_order_of_the_file(write) -> None:
    path = write("model:\n  width: wide\n  widht: 3\noptimizer:\n  name: adam\nsteps: 1.5\nstep: 2\n")
    found = mistakes(path, "items={label: 3}", "note=[1]")
    assert [place for place, _ in found] == [
        "2 model.width", "3 model.widht", "4 optimizer.lr", "6 steps", "7 step", "= items.label", "= note",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("model: {width: 2, widht: 3}", "1 model.widht", "`model` has no key `widht`. Did you mean `width`?"),
        (MODEL + "momentum: 3", "2 momentum", "There is no key `momentum`. It belongs in `optimizer.momentum`."),
        (MODEL + "scale: 3", "2 scale", "It belongs in `model.attention.scale` or `switches.left.scale`."),
        (MODEL + "quux: 3", "2 quux", "go under `variables`. Known here: items, model,"),
        (MODEL + "model.width: 3", "2 model.width", "Write it nested: `model:`"),
        ("model: {width: 2, rope: 1}", "1 model.rope", "There is no rope here."),
        ("model: {width: 2, alibi: 1}", "1 model.alibi", "It belongs in `model.attention.alibi`."),
        ("model: {width: 3}", "1 model.width", "It must be even."),
        ("model: {}", "1 model.width", "This key is required. (`width`: Width of the model.)"),
        ("steps: 3", "- model", "This key is required. (`model`: The model.)"),
        ("model:", "1 model", "Nothing stands here. Expected a block of keys."),
        ("model: 3", "1 model", "Expected a block of keys."),
        (MODEL + "steps:", "2 steps", "Nothing stands here. Expected a whole number. (`steps`: How many steps.)"),
        (MODEL + "note: 007", "2 note", "Expected text: put it in quotes ('7')."),
        (MODEL + "optimizer: {name: adan, lr: 1}", "2 optimizer.name", "`adam`, `lion`, `leo`. Did you mean `adam`?"),
        (
            MODEL + "optimizer: {lr: 1}",
            "2 optimizer.name",
            "This key is required. Expected one of `adam`, `lion`, `leo`.",
        ),
        (
            MODEL + "optimizer: {name: adam, lr: 0}",
            "2 optimizer.lr",
            "Expected a number greater than 0. (`lr`: Learning",
        ),
        (
            MODEL + "optimizer: {name: adam, lr: 1, momentum: 1}",
            "2 optimizer.momentum",
            "`optimizer` with `name: adam` has no key `momentum`. Known here: betas, lr, name.",
        ),
        (
            MODEL + "optimizer: {name: lion, betas: [1, 2]}",
            "2 optimizer.betas",
            "`optimizer` with `name: lion` has no key `betas`.",
        ),
        (MODEL + "optimizer: {name: adam, lr: 1, betas: [1]}", "2 optimizer.betas.1", "too few items"),
        (MODEL + "items:\n- label: a\n- size: 3", "4 items.1.label", "This key is required."),
        (MODEL + "items: {size: 3}", "2 items.label", "This key is required."),
        (MODEL + "items: {label: a, sise: 3}", "2 items.sise", "Did you mean `size`?"),
        (MODEL + "streams:\n  a: {label: x}\n  b: {labl: x, label: y}", "4 streams.b.labl", "Did you mean `label`?"),
        (MODEL + "switches: {lft: {}}", "2 switches.lft", "Did you mean `left`?"),
        (MODEL + "switches: {right: true}", "2 switches.right.label", "This key is required."),
        (MODEL + "model2: ${nowhere}", "2 model2", "Interpolation key 'nowhere' not found."),
        (MODEL + "note: ${steps", "2 note", "Not a valid interpolation"),
        (MODEL + "note: ${note}", "2 note", "Recursive interpolation"),
        (MODEL + "steps: ???", "2 steps", "`???` stands for a value that you must give."),
        (MODEL + "note: ${oc.env:HOME}", "2 note", "They do not read the environment"),
        (
            MODEL + "note: '${${variables.r}:HOME}'\nvariables: {r: oc.env}",
            "2 note",
            "They do not read the environment",
        ),
        (MODEL + "note: ${oc.decode:1}", "2 note", "Recipes know `${key}` only."),
    ],
)
def test_each_kind_of_mistake(write, text: str, place: str, message: str) -> None:
    found = mistakes(write(text))
    if "model2" in text:  # the key is unknown, too: one mistake is enough
        found = found[:1]
    assert len(found) == 1, found
    assert found[0][0] == place
    assert message in found[0][1]


def test_a_wrong_name_does_not_bury_itself_in_wrong_keys(write) -> None:
    found = mistakes(write(MODEL + "optimizer: {name: sgd, nesterov: true, dampening: 3}"))
    assert [place for place, _ in found] == ["2 optimizer.name"]


def test_members_of_a_plain_union_become_one_sentence(write) -> None:
    found = mistakes(write("model: {width: 2, attention: {scale: big}}"))
    assert found == [("1 model.attention.scale", "Expected a number or `auto`.")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", ":1: Not valid YAML: (did not find expected|expected) ',' or ']'"),
        ("a: 1\n\tb: 2", ":2: Not valid YAML: .*Indent with spaces"),
        ("a: *nope", ":1: Not valid YAML: found undefined alias"),
        ("a: !!python/object/apply:os.system ['true']", ":1: Not valid YAML: could not determine a constructor"),
        ("- 1", ":1: Expected a block of keys"),
        ("words", ":1: Expected a block of keys"),
        ("a: &x [*x]", "an alias that holds itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "Nested too deeply|Not valid YAML"),
    ],
)
def test_what_is_no_recipe_at_all(write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path, Schema)
    assert str(path) in str(caught.value)


def test_alias_bombs_are_refused(write) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="unfolds to more than"):
        load(write("\n".join(lines)), Schema)


def test_duplicate_keys_are_named_with_both_lines(write) -> None:
    found = mistakes(write("model:\n  width: 2\n  width: 4\nsteps: 1\nsteps: 2"))
    assert [place for place, _ in found] == ["3 model.width", "5 steps"]
    assert "first in line 2" in found[0][1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps 3", "written `key=value`"),
        ("--steps=3", "Write `steps=VALUE`"),
        ("=3", "written `key=value`"),
        ("model..width=3", "written `key=value`"),
        ("note=[1", "Not valid YAML"),
        ("items[5].size=3", "Cannot be set: list index out of range"),
        ("steps=many", "Expected a whole number."),
        ("steps.more=1", "Expected a whole number."),
        ("note=${oc.env:HOME}", "do not read the environment"),
    ],
)
def test_mistakes_on_the_command_line(write, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(write(MODEL + "items: [{label: a}]"), Schema, [override])
    assert "command line: " in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"no such file\. In that folder: .*other.yaml"):
        load(tmp_path / "nope.yaml", Schema)
    with pytest.raises(ConfigError, match="a folder"):
        load(tmp_path, Schema)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="Not UTF-8"):
        load(tmp_path / "binary", Schema)
    (tmp_path / "large").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="right file"):
        load(tmp_path / "large", Schema)


def test_the_block_reads_as_a_user_sees_it(write) -> None:
    path = write("model:\n  width: 2\n  alibi: true\noptimizer: {name: adam, lr: fast}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, Schema, ["seed=1"])
    assert str(caught.value).replace(str(path), "r.yaml") == (
        "r.yaml: 3 mistakes\n"
        "  r.yaml:3: model.alibi: true\n"
        "    It belongs in `model.attention.alibi`.\n"
        "  r.yaml:4: optimizer.lr: fast\n"
        "    Expected a number. (`lr`: Learning rate.)\n"
        "  command line: seed=1\n"
        "    There is no key `seed`. Values of your own, for interpolation, go under `variables`."
        " Known here: items, model, note, optimizer, steps, streams, switches, variables."
    )


def test_secrets_do_not_show_in_messages(write) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(MODEL + "api_key: planted\nitems: [{label: x, remote: 'sftp://me:planted@host'}]"), Schema)
    assert "planted" not in str(caught.value)


def test_an_escaped_interpolation_is_text(write) -> None:
    assert load(write(MODEL + r"note: '\${oc.env:HOME}'"), Schema).note == "${oc.env:HOME}"


def test_prepare_sees_resolved_data_and_its_result_is_validated(write) -> None:
    def double(data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "steps": data["model"]["width"] * 2}

    assert load(write("variables: {w: 4}\nmodel: {width: '${variables.w}'}"), Schema, prepare=double).steps == 8


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_a_config_error_or_a_config(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(ConfigError):  # `model` is required, so no such text is a recipe
        load(path, Schema)


@given(st.lists(st.text(max_size=20), max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_overrides_give_a_config_error_or_a_config(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str]
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(MODEL)
    with contextlib.suppress(ConfigError):
        assert isinstance(load(path, Schema, overrides), Schema)
