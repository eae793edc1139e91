"""Several sources become one mixture: what `streams` of a training recipe takes."""

from typing import Any

import yaml

from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.storage import is_remote

NAME = "mixture.yaml"

_ABOUT = """\
# The sources of this folder, for `dataset.streams` of a training recipe, which takes this file's path.
# How much of each is seen may be changed here (or in a copy) without preparing anything again:
# `proportion` (all streams or none), or `repeat` (times an epoch) or `choose` (rows an epoch).
"""


def mixture_yaml(recipe: PrepRecipe) -> str | None:
    """The training streams of a recipe as a file, or None when it writes all sources to one folder."""
    if not recipe.split_by_source:
        return None
    streams = streams_of(recipe, "train")
    return _ABOUT + yaml.safe_dump({"streams": streams}, sort_keys=False) if streams else None


def streams_of(recipe: PrepRecipe, split: str) -> dict[str, dict[str, Any]]:
    """The streams of a split, by source: where they lie and, for training, how much of each is seen."""
    place = "remote" if is_remote(recipe.out) else "local"
    streams: dict[str, dict[str, Any]] = {}
    for source in recipe.sources:
        if split not in recipe.splits_of(source):
            continue
        streams[source.name] = {place: f"{recipe.out.rstrip('/')}/{source.name}/{split}"}
        for key in ("proportion", "repeat") if split == "train" else ():
            if (value := getattr(source, key)) is not None:
                streams[source.name][key] = value
    return streams
