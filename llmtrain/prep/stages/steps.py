"""From a stage's keys to the function that judges documents."""

from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from llmtrain.prep.stages.config import (
    DatatroveFilter,
    Decontaminate,
    Language,
    Length,
    Pii,
    Regex,
    Repetition,
    StageConfig,
    SymbolRatio,
    UserFunction,
)
from llmtrain.prep.stages.step import Step

if TYPE_CHECKING:
    from llmtrain.prep.storage import FileInfo


def open_step(stage: StageConfig) -> Step:
    """The step of a stage; made once in a process, for all of its partitions, as long as its files stay as they are.

    Raises:
        UserError: the stage needs something that is not there: a library, a function, a file.
    """
    files: tuple[FileInfo, ...] = ()
    if isinstance(stage, Decontaminate):
        from llmtrain.prep.storage import glob_files

        files = tuple(file for pattern in stage.files for file in glob_files(pattern))
    return _open(stage.model_dump_json(), files)


@lru_cache(maxsize=64)
def _open(described: str, files: "tuple[FileInfo, ...]") -> Step:
    # Imported one by one: a recipe pays for the stages that it has.
    match TypeAdapter[StageConfig](StageConfig).validate_json(described):
        case Length() as stage:
            from llmtrain.prep.stages.lengths import length

            return length(stage)
        case SymbolRatio() as stage:
            from llmtrain.prep.stages.symbols import symbol_ratio

            return symbol_ratio(stage)
        case Repetition() as stage:
            from llmtrain.prep.stages.repetition import repetition

            return repetition(stage)
        case Language() as stage:
            from llmtrain.prep.stages.functions import language

            return language(stage)
        case UserFunction() as stage:
            from llmtrain.prep.stages.functions import user_function

            return user_function(stage)
        case Regex() as stage:
            from llmtrain.prep.stages.patterns import regex

            return regex(stage)
        case Pii() as stage:
            from llmtrain.prep.stages.pii import pii

            return pii(stage)
        case Decontaminate() as stage:
            from llmtrain.prep.stages.decontaminate import decontaminate

            return decontaminate(stage)
        case DatatroveFilter() as stage:
            from llmtrain.prep.stages.trove import datatrove_filter

            return datatrove_filter(stage)
        case stage:
            raise ValueError(f"{stage.name} is a pass over all documents, not a step")
