"""Answers to many requests, in their order, though prompts of about the same length run together.

Requests are taken in windows, and the prompts of a window in batches by length. Windows and batches depend on the
requests alone, not on where a job was interrupted: so a job that goes on computes in the same shapes and writes the
same bytes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from llmtrain.errors import UserError
from llmtrain.generation.conversation import TextStream, decode, encode, render
from llmtrain.generation.decoder import Progress, decoder_for
from llmtrain.generation.generate import Row, steps, too_long
from llmtrain.generation.requests import Messages, Request, refuse
from llmtrain.generation.sampling import Sampling
from llmtrain.generation.settings import Settings
from llmtrain.stop_tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCHES_IN_WINDOW = 8
"""The more, the less padding; and the more is computed again after an interruption."""

Tell = Callable[[int, int], None]
"""Called with how many tokens and how many answers there are since the last call."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt of a request."""

    text: str
    """The new text, without special tokens; behind the prompt, where `return_full_text` says so."""
    tokens: list[int]
    """The new token ids, with the one that ended it."""
    finished: bool
    """Whether it ended by itself or with a stop text (False: max_new_tokens ended it)."""


def as_json(request: Request, answers: Sequence[Answer]) -> dict[str, Any]:
    """One line of the output: the line that was asked, and the answer behind it.

    For `input_data` the answer is `output`, the endpoint's response: a row for each text, with the column "0".
    """
    reasons = ["stop" if answer.finished else "length" for answer in answers]
    if request.form == "input_data":
        return {**request.fields, "output": [{"0": answer.text} for answer in answers], "finish_reason": reasons}
    return {**request.fields, "completion": answers[0].text, "finish_reason": reasons[0]}


class Answering:
    """A model and its tokenizer that answer requests.

    Args:
        model: whole, in evaluation mode.
        tokenizer: with a chat template, where there are conversations.
        seed: the same seed and the same requests give the same answers.
        batch_size: prompts that run together.
        progress: told how far a long prompt has been read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._seed, self._batch_size, self._progress = seed, batch_size, progress
        self._stops = stop_ids(tokenizer)
        self._positions = decoder_for(model).positions

    def check(self, requests: Iterable[Request]) -> None:
        """Look at what can fail, before hours are spent: templates and lengths.

        Raises:
            UserError: names the requests that cannot be answered.
        """
        problems: list[str] = []
        for request in requests:
            if self._positions is None and request.form != "messages" and all(request.prompts):
                continue
            try:
                for prompt in request.prompts:
                    ids, new = self._encode(prompt), request.settings.max_new_tokens
                    if self._positions is not None and len(ids) + new - 1 > self._positions:
                        raise UserError(too_long(len(ids), new, self._positions))
            except UserError as problem:
                problems.append(f"{request.place}: {problem}")
        refuse(problems)

    def answer(
        self, requests: Iterable[Request], *, done: int = 0, tell: Tell = lambda tokens, answers: None
    ) -> Iterator[tuple[Request, list[Answer]]]:
        """The answers of one request after the other; those of the first `done` requests are not wanted."""
        index = number = 0  # of the window's first prompt and first request
        for window in _windows(requests, self._batch_size * BATCHES_IN_WINDOW):
            if number + len(window) > done:
                yield from self._answer_window(window, index, done - number, tell)
            number += len(window)
            index += sum(len(request.prompts) for request in window)

    def _answer_window(
        self, window: list[Request], index: int, done: int, tell: Tell
    ) -> Iterator[tuple[Request, list[Answer]]]:
        rows: list[Row] = []
        asked: list[int] = []  # which request a row belongs to
        for number, request in enumerate(window):
            settings = request.settings
            sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
            for prompt in request.prompts:
                rows.append(Row(self._encode(prompt), settings.max_new_tokens, sampling, index + len(rows)))
                asked.append(number)
        found: dict[int, Answer] = {}
        ready = max(done, 0)
        for batch in self._batches(rows):
            if max(asked[row] for row in batch) < done:
                continue
            for row, answer in zip(batch, self._run(batch, rows, asked, window, tell), strict=True):
                found[row] = answer
            while ready < len(window):
                own = [row for row, number in enumerate(asked) if number == ready]
                if not all(row in found for row in own):
                    break
                yield window[ready], [found.pop(row) for row in own]
                ready += 1

    def _batches(self, rows: list[Row]) -> Iterator[list[int]]:
        """Rows that run together, the longest first: what does not fit into memory fails at once."""
        batch: list[int] = []
        for row in sorted(range(len(rows)), key=lambda row: (-len(rows[row].ids), row)):
            # Where positions end, padding counts: a long prompt may leave no room for another one's long answer.
            longest = max(rows[n].max_new_tokens for n in [*batch, row])
            full = self._positions is not None and len(rows[[*batch, row][0]].ids) + longest - 1 > self._positions
            if batch and (full or len(batch) == self._batch_size):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _run(
        self, batch: list[int], rows: list[Row], asked: list[int], window: list[Request], tell: Tell
    ) -> list[Answer]:
        settings = [window[asked[row]].settings for row in batch]
        prompts = [_prompt_of(window[asked[row]], row - asked.index(asked[row])) for row in batch]
        watchers = [StopText(self._tokenizer, s.stop) if s.stop else None for s in settings]

        def ended(place: int, token: int) -> bool:
            watcher = watchers[place]
            return watcher is not None and watcher.ends(token)

        tokens: list[list[int]] = [[] for _ in batch]
        decoder = decoder_for(self._model, self._progress)
        chosen = [rows[row] for row in batch]
        for step in steps(decoder, chosen, eos_ids=self._stops, seed=self._seed, ended=ended):
            for place, token in step:
                tokens[place].append(token)
            tell(len(step), 0)
        tell(0, len(batch))
        return [self._answer(*parts) for parts in zip(prompts, settings, tokens, watchers, strict=True)]

    def _answer(
        self, prompt: str | Messages, settings: Settings, tokens: list[int], watcher: "StopText | None"
    ) -> Answer:
        text = decode(self._tokenizer, tokens)
        finished = tokens[-1] in self._stops
        if watcher is not None and watcher.hit:
            places = [text.find(stop) for stop in settings.stop if stop in text]
            text, finished = text[: min(places, default=len(text))], True
        if settings.return_full_text and isinstance(prompt, str):
            text = prompt + text
        return Answer(text, tokens, finished)

    def _encode(self, prompt: str | Messages) -> list[int]:
        text = prompt if isinstance(prompt, str) else render(self._tokenizer, prompt)
        ids = encode(self._tokenizer, text)
        if not ids and self._tokenizer.eos_token_id is None:
            raise UserError("an empty prompt needs a tokenizer with an end-of-text token, behind which texts begin")
        return ids or [int(self._tokenizer.eos_token_id)]  # an empty text stands for the start of a document


class StopText:
    """Watches one answer for texts that end it.

    Attributes:
        hit: whether one of them has appeared.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stops: Sequence[str]) -> None:
        self._stream, self._stops = TextStream(tokenizer), stops
        self._longest = max(map(len, stops))
        self._tail = ""
        self.hit = False

    def ends(self, token: int) -> bool:
        """Whether the answer ends with this token."""
        text = self._tail + self._stream.push(token)
        self.hit = self.hit or any(stop in text for stop in self._stops)
        self._tail = text[-self._longest :]
        return self.hit


def _prompt_of(request: Request, number: int) -> str | Messages:
    return request.prompts[number]


def _windows(requests: Iterable[Request], n_prompts: int) -> Iterator[list[Request]]:
    """Whole requests, with so many prompts together or a few more."""
    window: list[Request] = []
    count = 0
    for request in requests:
        window.append(request)
        count += len(request.prompts)
        if count >= n_prompts:
            yield window
            window, count = [], 0
    if window:
        yield window
