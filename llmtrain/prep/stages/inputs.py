"""What a recipe's stages read besides the documents."""

import hashlib
from collections.abc import Sequence
from typing import Any

from llmtrain.errors import UserError
from llmtrain.prep.stages.config import Decontaminate, Language, StageConfig, UserFunction


def describe_stages(stages: Sequence[StageConfig]) -> list[dict[str, Any]]:
    """What decides the stages' verdicts besides the recipe, for `prep.json`: evaluation files and users' functions.

    Raises:
        UserError: a file or function is not there.
    """
    described: list[dict[str, Any]] = []
    for index, stage in enumerate(stages):
        if isinstance(stage, Decontaminate):
            from llmtrain.prep.stages.decontaminate import files_of

            files = {file: _digest(file) for file in files_of(stage)}
            described.append({"stage": f"{index}-{stage.name}", "files": files})
        elif isinstance(stage, Language | UserFunction):
            from llmtrain.prep.stages.functions import resolve
            from llmtrain.user_code import files_digest

            digest = files_digest(resolve(stage.name, stage.function))
            described.append({"stage": f"{index}-{stage.name}", "function": stage.function, "digest": digest})
    return described


def _digest(file: str) -> str:
    from llmtrain.prep.storage import open_input

    digest = hashlib.sha256()
    try:
        with open_input(file) as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    except OSError as problem:
        raise UserError(f"{file} cannot be read: {problem}") from problem
    return digest.hexdigest()[:16]
