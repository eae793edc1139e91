"""README.md of an export: what the model is, what it was trained on, and how the export was proven.

Nothing is invented: what a checkpoint does not say is left out.
"""

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xxhash
import yaml

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.model_card_facts import architecture, data, metrics, quantity
from llmtrain.checkpoint.resolve import run_folder
from llmtrain.model.config import MPTConfig
from llmtrain.redaction import redact

CARD = "README.md"
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Described(Protocol):
    """What the card says of a layout."""

    @property
    def name(self) -> str:
        """`mpt`, `llama`, `mistral` or `code`."""

    @property
    def reason(self) -> str | None:
        """Why it is not transformers' plain MPT."""


@dataclass(frozen=True)
class CardFacts:
    """What the export itself knows."""

    parameters: int
    """How many the files hold."""
    dtype: str
    """Of the weights."""
    max_difference: float
    """Largest difference of logits between our model and the one that transformers opened."""
    tolerance: float
    """What was allowed."""
    positions: int
    """Positions at which logits were compared."""
    tokens: int
    """Greedy tokens that were compared."""
    tokenizer: bool = True
    """Whether one was written."""
    adapters: bool = False
    """Whether it is adapters alone."""
    step: int | None = None
    """Finished optimizer steps, where the source is no checkpoint that says so."""
    tokens_seen: int | None = None
    """Tokens trained on, where the source is no checkpoint that says so."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages that trained it, where the source is no checkpoint that says so."""


def model_card(
    source_checkpoint: Path,
    *,
    layout: Described | None,
    config: MPTConfig | None,
    facts: CardFacts,
    name: str,
    recipe: Mapping[str, Any] | None = None,
    license: str | None = None,
    run: Path | None = None,
) -> str:
    """The text of an export's README.md, with a header that the hub reads.

    Args:
        source_checkpoint: What was exported; its manifest and its run tell steps, tokens and metrics.
        layout: How it was written; None for a model that is no MPT.
        config: Of our model; None for a model that is no MPT.
        facts: What the export knows.
        name: Its title, such as the name of the folder.
        recipe: The resolved recipe, where the source is no checkpoint that holds it.
        license: Its identifier; `metadata.license` of the recipe when left out.
        run: The run's folder, where the source does not lie in it.
    """
    known = _manifest_of(source_checkpoint)
    recipe = recipe if recipe is not None else (known.recipe if known is not None else None)
    run = run if run is not None else run_folder(source_checkpoint)
    step = facts.step if facts.step is not None else known.step if known is not None else None
    seen = facts.tokens_seen if facts.tokens_seen is not None else known.tokens if known is not None else None
    license = license or _license_of(recipe)
    base = _base_of(recipe)
    with_code = layout is not None and layout.name == "code"
    parts = [
        _header(license, base, facts, with_code=with_code, config=config),
        f"# {name}\n\n" + _what(config, facts, base, step, seen),
        "License: " + (f"{license}." if license else "unknown. Set one with `llmtrain export --license`.") + "\n",
        _section("Architecture", architecture(config, facts.parameters, facts.dtype) if config is not None else ""),
        _section("How to open it", _how(facts, layout, with_code=with_code, base=base)),
        _section("Training", _training(recipe, step, seen)),
        _section("Data", data(recipe)),
        _section("Metrics", metrics(run, source_checkpoint, step)),
        _section("Where it comes from", _origin(source_checkpoint, known, facts)),
    ]
    return "\n".join(part for part in parts if part)


def checksum_of(checkpoint: Path) -> str | None:
    """xxh128 of a checkpoint's manifest, which lists the hashes of its files; None without one."""
    file = checkpoint / manifest.MANIFEST
    return xxhash.xxh3_128(file.read_bytes()).hexdigest() if file.is_file() else None


def _manifest_of(source: Path) -> manifest.Manifest | None:
    return manifest.read(source) if (source / manifest.MANIFEST).is_file() else None


def _license_of(recipe: Mapping[str, Any] | None) -> str | None:
    metadata = (recipe or {}).get("metadata")
    value = metadata.get("license") if isinstance(metadata, Mapping) else None
    return str(value) if value else None


def _base_of(recipe: Mapping[str, Any] | None) -> str | None:
    """What training started from, as the recipe names it."""
    model = (recipe or {}).get("model")
    if not isinstance(model, Mapping):
        return None
    if model.get("name") == "hf_causal_lm":
        return str(model["pretrained_model_name_or_path"]) if model.get("pretrained", True) else None
    pretrained = model.get("pretrained")
    return str(pretrained) if isinstance(pretrained, str) else None


def _header(
    license: str | None, base: str | None, facts: CardFacts, *, with_code: bool, config: MPTConfig | None
) -> str:
    """The YAML that the hub reads (docs: huggingface.co/docs/hub/model-cards#model-card-metadata)."""
    head: dict[str, Any] = {}
    if license and _LICENSE_ID.fullmatch(license):
        head["license"] = license
    else:
        head |= {"license": "other", "license_name": license or "unknown"}
    head["library_name"] = "peft" if facts.adapters else "transformers"
    head["pipeline_tag"] = "text-generation"
    head["tags"] = ["llmtrain", *(["mpt"] if config is not None else []), *(["custom_code"] if with_code else [])]
    if base and _HUB_NAME.fullmatch(base) and not Path(base).exists():
        head["base_model"] = base
    return "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---\n"


def _what(config: MPTConfig | None, facts: CardFacts, base: str | None, step: int | None, seen: int | None) -> str:
    kind = "Adapters (LoRA) for a language model" if facts.adapters else "A causal language model"
    size = f" with {quantity(facts.parameters)} parameters"
    shape = " of the MPT family" if config is not None else ""
    start = f", trained from `{redact(base)}`" if base else ""
    length = f" for {step:,} optimizer steps" if step else ""
    tokens = f" on {quantity(seen)} tokens" if seen else ""
    trained = start or (", trained" if length or tokens else "")
    return f"{kind}{shape}{size}{trained}{length}{tokens}, exported by llmtrain.\n"


def _how(facts: CardFacts, layout: Described | None, *, with_code: bool, base: str | None) -> str:
    option = ", trust_remote_code=True" if with_code else ""
    if facts.adapters:
        opening = (
            "from peft import AutoPeftModelForCausalLM",
            "model = AutoPeftModelForCausalLM.from_pretrained(place)",
        )
    else:
        opening = (
            f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if facts.tokenizer else ''}",
            f"model = AutoModelForCausalLM.from_pretrained(place{option})",
        )
    lines = [opening[0], "", 'place = "."  # this folder, or the name of its repository', opening[1]]
    if facts.tokenizer and not facts.adapters:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained(place{option})")
    text = "```python\n" + "\n".join(lines) + "\n```\n"
    if with_code and layout is not None:
        text += f"\nIt needs `trust_remote_code=True`, which runs the Python file beside the weights: {layout.reason}\n"
    elif layout is not None and layout.reason:
        text += f"\nIt is written in the {layout.name.capitalize()} layout of transformers: {layout.reason}\n"
    if not facts.tokenizer:
        text += "\nThere is no tokenizer with it: none is known for the checkpoint.\n"
    return text


def _training(recipe: Mapping[str, Any] | None, step: int | None, seen: int | None) -> str:
    lines = []
    if step is not None:
        lines.append(f"- optimizer steps: {step:,}")
    if seen is not None:
        lines.append(f"- tokens seen: {seen:,}")
    text = "\n".join(lines) + "\n" if lines else ""
    if recipe:
        body = yaml.safe_dump(redact(dict(recipe)), sort_keys=False, allow_unicode=True, width=120)
        text += f"\nThe recipe, with every default written out and secrets masked:\n\n```yaml\n{body}```\n"
    return text


def _origin(source: Path, known: manifest.Manifest | None, facts: CardFacts) -> str:
    lines = [f"- checkpoint: `{source.name}`"]
    if (checksum := checksum_of(source)) is not None:
        lines.append(f"- xxh128 of its manifest: `{checksum}`")
    versions = dict(facts.versions) or (known.versions if known is not None else {})
    if versions:
        lines.append("- trained with " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    opened_by = "PEFT on its base model" if facts.adapters else "transformers"
    lines.append(
        f"- opened by {opened_by} ({importlib.metadata.version('transformers')}) before it was put here: all tensors "
        f"equal, logits in float32 within {facts.max_difference:.1e} (allowed: {facts.tolerance:.1e}) at "
        f"{facts.positions} positions, {facts.tokens} greedy tokens equal"
    )
    return "\n".join(lines) + "\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""
