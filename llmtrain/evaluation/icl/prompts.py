"""Rows become prompts: text for text what llm-foundry's InContextLearning...Dataset classes build.

Its tasks are compared with published numbers, so its habits are kept, the odd ones too: the examples stand in the
order in which a Python set of their numbers is walked, `prelimiter` stands before `example_delimiter` in schema tasks,
and a context loses the blanks at its end.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmtrain.evaluation.icl.config import ICLTaskConfig
from llmtrain.evaluation.icl.rows import Row


@dataclass(frozen=True)
class Prompt:
    """The texts of one question. Preamble and context are tokenized apart, as is the continuation."""

    row: Row
    preamble: str
    """prompt_string and the examples."""
    contexts: tuple[str, ...]
    """What follows: one, or one for each option of a schema task."""
    continuations: tuple[str, ...]
    """What is scored behind it: one, or one for each choice; none for generated answers."""


def prompts(task: ICLTaskConfig, num_fewshot: int, rows: Sequence[Row], *, prefix_space: bool) -> Iterator[Prompt]:
    """The prompts of all rows, in order: the examples are drawn from one generator, one row after another.

    Args:
        task: the task.
        num_fewshot: examples before each question.
        rows: its questions, or those of one category.
        prefix_space: whether continuations begin with a blank: see `llmtrain.evaluation.icl.encode`.
    """
    build = _Texts(task, rows)
    chance = random.Random(task.fewshot_random_seed)
    for index, row in enumerate(rows):
        preamble = task.prompt_string
        if num_fewshot > 0:
            for example in fewshot_indices(len(rows), num_fewshot, index, chance):
                preamble += build.example(rows[example], preamble)
        ends = build.continuations(row)
        if prefix_space:
            ends = [end if end.startswith(" ") else f" {end}" for end in ends]
        yield Prompt(row, preamble, tuple(build.contexts(row, preamble)), tuple(ends))


def fewshot_indices(n_rows: int, num_fewshot: int, index: int, chance: random.Random) -> list[int]:
    """Which rows stand before row `index`: that many others, or all others where there are fewer.

    The same draws in the same order as llm-foundry's get_fewshot_sample_idxs.
    """
    chosen = set(chance.sample(range(n_rows), min(num_fewshot, n_rows - 1)))
    if index in chosen:
        chosen.remove(index)
        instead = index
        while instead == index or instead in chosen:
            instead = chance.choice(range(n_rows))
        chosen.add(instead)
    return list(chosen)


class _Texts:
    """The texts of rows of one task."""

    def __init__(self, task: ICLTaskConfig, rows: Sequence[Row]) -> None:
        self.task = task
        self.kind = task.icl_task_type
        self.has_thoughts = any(row.values.get("chain_of_thought") is not None for row in rows)

    def example(self, row: Row, before: str) -> str:
        """A question with its right answer."""
        task = self.task
        between = task.example_delimiter if before else ""
        if self.kind == "schema":
            context = row.texts("context_options")[row.gold]
            return f"{task.before_each}{between}{context}{task.continuation_delimiter}{row.text('continuation')}"
        return f"{between}{task.before_each}{self._question(row)}{task.continuation_delimiter}{self.answer(row)}"

    def contexts(self, row: Row, before: str) -> list[str]:
        """What stands before the continuation, for each option."""
        task = self.task
        if self.kind == "schema":
            options = row.texts("context_options")
            if not before:
                return [f"{task.before_each}{option}" for option in options]
            end = task.continuation_delimiter.rstrip()
            return [f"{task.before_each}{task.example_delimiter}{option}{end}" for option in options]
        between = task.example_delimiter if before else ""
        return [f"{between}{task.before_each}{self._question(row)}{task.continuation_delimiter}".rstrip()]

    def continuations(self, row: Row) -> list[str]:
        """What is scored."""
        if self.kind == "multiple_choice":
            return row.texts("choices")
        return [] if self.kind == "generation_task_with_answers" else [row.text("continuation")]

    def answer(self, row: Row) -> str:
        """The right answer, as it stands in an example."""
        if self.kind == "multiple_choice":
            return row.texts("choices")[row.gold]
        if self.kind == "language_modeling":
            return row.text("continuation")
        return with_thoughts(self.task, row, row.text("answer")) if self.has_thoughts else row.text("answer")

    def _question(self, row: Row) -> str:
        return row.text("query" if self.kind == "multiple_choice" else "context")


def with_thoughts(task: ICLTaskConfig, row: Row, answer: str) -> str:
    """An answer behind its chain of thought."""
    return f"{row.text('chain_of_thought')}{task.cot_delimiter}{answer}"
