"""The stages of a recipe, applied to documents one after another, and what they did."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import UserError
from llmtrain.prep.documents import Document, whole
from llmtrain.prep.stages.config import ExactDedup, MinHashDedup, StageConfig
from llmtrain.prep.stages.report import StageCounts
from llmtrain.prep.stages.step import Change, Drop, Step, Verdict
from llmtrain.prep.stages.steps import open_step


def pass_name(index: int, stage: ExactDedup | MinHashDedup) -> str:
    """The name of the pass of a stage, the recipe's `index`-th."""
    return f"{index}-{stage.name}"


def needs_whole_documents(stages: Sequence[StageConfig]) -> bool:
    """Whether a document must not come in parts: what a stage looks for could lie across them."""
    return not all(isinstance(stage, ExactDedup) and not stage.ignore for stage in stages)


class Pipeline:
    """Stages, applied to the documents of one partition.

    Args:
        stages: the recipe's, or the first of them.
        drops: pass -> ordinals of the documents to drop, sorted, for this partition.

    Raises:
        UserError: a stage needs something that is not there: a library, a function, a file.
    """

    def __init__(self, stages: Sequence[StageConfig], drops: Mapping[str, NDArray[np.int64]]) -> None:
        self._whole = needs_whole_documents(stages)
        self._stages: list[tuple[StageCounts, Step | _Copies]] = []
        for index, stage in enumerate(stages):
            step: Step | _Copies
            if isinstance(stage, ExactDedup | MinHashDedup):
                step = _Copies(stage, drops[pass_name(index, stage)])
            else:
                step = open_step(stage)
            self._stages.append((StageCounts(stage.name, stage.samples), step))

    def run(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents that no stage drops, as the stages change them.

        Raises:
            UserError: a stage fails on a document; named with the document's place.
        """
        keep = True
        for document in whole(documents) if self._whole else documents:
            if document.part in ("middle", "last"):
                for counts, _ in self._stages:
                    counts.more(document, kept=keep)
                    if not keep and counts.dropped_last:
                        break
            else:
                judged = self._judge(document)
                keep = judged is not None
                document = judged or document
            if keep:
                yield document

    def _judge(self, document: Document) -> Document | None:
        for counts, step in self._stages:
            try:
                verdict = step(document.text)
            except UserError as problem:
                raise UserError(f"{document.place}: stage {counts.name}: {problem}") from problem
            except Exception as problem:  # a user's function, or a library's
                reason = f"{type(problem).__name__}: {problem}"
                raise UserError(f"{document.place}: stage {counts.name} failed: {reason}") from problem
            counts.add(document, verdict)
            if isinstance(verdict, Drop):
                return None
            if isinstance(verdict, Change):
                n_bytes = len(verdict.text.encode("utf-8", "surrogatepass"))
                document = document._replace(text=verdict.text, n_bytes=n_bytes)
        return document

    def report(self) -> dict[str, Any]:
        """What each stage did so far, for `merge_reports`."""
        return {"stages": [counts.as_dict() for counts, _ in self._stages]}


class _Copies:
    """Drops documents by their number among those that reach the stage."""

    def __init__(self, stage: ExactDedup | MinHashDedup, ordinals: NDArray[np.int64]) -> None:
        what = "a copy" if isinstance(stage, ExactDedup) else "a near copy"
        self._drop = Drop(f"{what} of an earlier document")
        self._ordinals = iter(ordinals.tolist())
        self._next: int | None = next(self._ordinals, None)
        self._seen = 0

    def __call__(self, text: str) -> Verdict:
        self._seen += 1
        if self._next != self._seen - 1:
            return None
        self._next = next(self._ordinals, None)
        return self._drop
