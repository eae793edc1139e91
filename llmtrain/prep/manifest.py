"""`prep.json`: what was made from what. It appears with the finished output and decides whether a rerun has work."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.data.shards import MANIFEST
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json
from llmtrain.prep.config import DataRecipe, PrepRecipe
from llmtrain.prep.inputs import describe_inputs
from llmtrain.prep.work import Work
from llmtrain.redaction import redact
from llmtrain.tokenizer import fingerprint

FORMAT = 1
WEIGHTS = ("proportion", "repeat")
"""Keys of a source that the loader's streams have, and nothing else."""
_NOT_CONTENT = {"out", "overwrite", "variables", "task"}  # keys of the recipe that do not change what is written


def recipe_content(recipe: DataRecipe) -> dict[str, Any]:
    """The part of a recipe that decides what is written, without secrets."""
    content: dict[str, Any] = redact(recipe.model_dump(mode="json", exclude=_NOT_CONTENT))
    return content


def deciding(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `recipe_content` gave, without how much the loader takes of each source: no shard depends on that."""
    sources = [{key: source[key] for key in source if key not in WEIGHTS} for source in content.get("sources", [])]
    return {**content, "sources": sources}


def inputs_content(recipe: PrepRecipe, out: str) -> dict[str, Any]:
    """What the recipe reads, as it is now: files by name and size, a local tokenizer by its fingerprint.

    Raises:
        UserError: no file matches, or one is of the output.
    """
    found: dict[str, Any] = {source.name: describe_inputs(source, out) for source in recipe.sources}
    name = recipe.tokenizer.name
    local = name is not None and Path(name).expanduser().is_dir()
    content: dict[str, Any] = {"sources": found, "local_tokenizer": None}
    if local and name is not None:
        content["local_tokenizer"] = fingerprint(name)
    if recipe.stages:
        from llmtrain.prep.stages import describe_stages

        content["stages"] = describe_stages(recipe.stages)
    return content


def to_json(content: dict[str, Any]) -> bytes:
    """`prep.json`."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def finished(
    recipe: DataRecipe, inputs: dict[str, Any], work: Work, *, replaces: bool = False
) -> dict[str, Any] | None:
    """The manifest, when this very recipe has been carried out on these inputs; None when there is work to do.

    Args:
        recipe: the recipe.
        inputs: as `inputs_content` has them.
        work: of the recipe's output.
        replaces: whether another output may be replaced, although the recipe does not say `overwrite: true`.

    Raises:
        UserError: `out` holds something else that may not be replaced, or something that `llmtrain prep` did not write.
    """
    data = work.published(MANIFEST)
    if data is None:
        if work.occupied():
            raise UserError(
                f"out: {recipe.out} exists and was not made by `llmtrain prep` (no {MANIFEST}): choose another folder"
            )
        return None
    try:
        done: dict[str, Any] = parse_json(data)
    except ValueError as problem:
        if recipe.overwrite or replaces:
            return None
        raise UserError(
            f"{recipe.out}/{MANIFEST} is damaged ({problem}): make the data again with overwrite=true"
        ) from problem
    before, now = _with_newer_keys(done, recipe), recipe_content(recipe)
    if isinstance(recipe, PrepRecipe):
        before, now = {**before, "recipe": deciding(before.get("recipe", {}))}, deciding(now)
    changed = _differences(before, now, inputs)
    if not changed:
        return done
    if recipe.overwrite or replaces:
        return None
    raise UserError(
        f"out: {recipe.out} was made with other settings; changed since: {', '.join(changed)}. "
        "Choose another folder, or replace it with overwrite=true"
    )


def _with_newer_keys(done: dict[str, Any], recipe: DataRecipe) -> dict[str, Any]:
    """A manifest with the keys that have come since it was written, at the defaults that gave what it describes."""
    beside = recipe.model_dump(mode="json", include=_NOT_CONTENT)
    try:
        before = type(recipe).model_validate({**beside, **done.get("recipe", {})})
    except (ValueError, TypeError):
        return done  # of another kind, or with keys that are gone: then it differs
    return {**done, "recipe": recipe_content(before)}


def _differences(done: dict[str, Any], recipe: dict[str, Any], inputs: dict[str, Any]) -> list[str]:
    before = done.get("recipe", {})
    changed = [key for key in sorted({*before, *recipe}) if before.get(key) != recipe.get(key)]
    if done.get("format") != FORMAT:
        changed.append("the manifest's format")
    if not changed and done.get("inputs") != inputs:
        old = done.get("inputs", {}).get("sources", {})
        names = [name for name, now in inputs["sources"].items() if old.get(name) != now]
        stages = done.get("inputs", {}).get("stages") != inputs.get("stages")
        other = "the stages' files and functions" if stages else "the tokenizer's files"
        changed.append(f"the files of {', '.join(names)}" if names else other)
    return changed
