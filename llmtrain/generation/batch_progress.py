"""How far a batch of prompts is: answers, tokens a second, time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llmtrain.generation.batch import Tell

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def batch_progress(console: Console, done: int, total: int) -> Iterator[Tell]:
    """A bar on a terminal, otherwise a line every few seconds.

    Args:
        console: where to.
        done: prompts that were answered before.
        total: prompts altogether.
    """
    start = said = time.monotonic()
    answers = tokens = 0

    def state() -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        left = f", {_duration((total - done - answers) * seconds / answers)} left" if answers else ""
        return f"{done + answers:,} of {total:,} prompts, {tokens / seconds:,.0f} tokens/s{left}"

    if not console.is_terminal:

        def tell_lines(new_tokens: int, new_answers: int) -> None:
            nonlocal said, answers, tokens
            tokens, answers = tokens + new_tokens, answers + new_answers
            if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                console.print(f"generate: {state()}", highlight=False)

        yield tell_lines
    else:
        columns = (TextColumn("generate"), BarColumn(), TextColumn("{task.fields[state]}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("generate", total=total, completed=done, state="")

            def tell_bar(new_tokens: int, new_answers: int) -> None:
                nonlocal answers, tokens
                tokens, answers = tokens + new_tokens, answers + new_answers
                bar.update(task, completed=done + answers, state=state())

            yield tell_bar
    seconds = time.monotonic() - start
    if answers:
        rate = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
        console.print(
            f"generate: {answers:,} answers, {tokens:,} tokens in {_duration(seconds)}, {rate}", highlight=False
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
