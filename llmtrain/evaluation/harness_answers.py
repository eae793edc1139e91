"""Answers that end at a string: generation as tasks of lm-evaluation-harness ask for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmtrain.errors import UserError
from llmtrain.generation.conversation import decode
from llmtrain.generation.decoder import decoder_for
from llmtrain.generation.generate import Row, steps
from llmtrain.generation.sampling import Sampling
from llmtrain.stop_tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same, the first counts: as in the harness."""
_NO_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}
"""Keys that may stand there with the value that changes nothing."""
MAX_NEW_TOKENS = 256
"""When a task does not say; the harness's own."""


@dataclass(frozen=True)
class Answering:
    """How answers are generated."""

    until: tuple[str, ...]
    """An answer ends before the first of these."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    sampling: Sampling
    """How tokens are drawn."""

    @classmethod
    def of(cls, gen_kwargs: Mapping[str, Any]) -> "Answering":
        """From the harness's `generation_kwargs`: greedy unless `do_sample`, or a temperature, says otherwise.

        Raises:
            UserError: a key that generation here does not have: ignoring it would change the task.
        """
        left = dict(gen_kwargs)
        until = left.pop("until", None) or []
        lengths = [left.pop(key, None) for key in _LENGTH]
        do_sample, temperature = left.pop("do_sample", None), left.pop("temperature", None)
        if do_sample is None:
            do_sample = bool(temperature)
        top_k, top_p = left.pop("top_k", None), left.pop("top_p", None)
        unknown = {key: value for key, value in left.items() if key not in _NO_EFFECT or value != _NO_EFFECT[key]}
        if unknown:
            raise UserError(
                f"generation_kwargs {', '.join(f'{key}: {value}' for key, value in unknown.items())}: not supported. "
                f"There are until, {_LENGTH[0]}, do_sample, temperature, top_k and top_p"
            )
        sampling = Sampling(temperature=0.0)
        if do_sample:
            sampling = Sampling(
                temperature=1.0 if temperature is None else float(temperature),
                top_k=int(top_k or 0),
                top_p=1.0 if top_p is None else float(top_p),
            )
        return cls(
            until=tuple(text for text in ((until,) if isinstance(until, str) else until) if text),
            max_new_tokens=int(next((n for n in lengths if n is not None), MAX_NEW_TOKENS)),
            sampling=sampling,
        )


def answer(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Mapping[int, Sequence[int]],
    how: Answering,
    *,
    seed: int = 0,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    """The text that a model writes after each prompt, up to a stop string, an end token or the longest length.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompts: number of the prompt among all, which with the seed decides what chance does -> token ids, at least
            one. They run as one batch.
        how: when answers end, and how tokens are drawn.
        seed: the same seed draws the same.
        agree: see `generate`; for ranks that share a model.
    """
    written: list[list[int]] = [[] for _ in prompts]
    # Each token has at least one byte of the text, so a stop string lies within so many tokens; a decoder may leave out
    # a space where the piece begins, hence a few more.
    tail = max((len(text.encode()) for text in how.until), default=0) + 4

    def ended(row: int, token: int) -> bool:
        text = str(tokenizer.decode(written[row][-tail:], skip_special_tokens=False))  # one may be a stop string
        return any(stop in text for stop in how.until)

    rows = [Row(ids, how.max_new_tokens, how.sampling, number) for number, ids in prompts.items()]
    ends = stop_ids(tokenizer)
    for step in steps(decoder_for(model), rows, eos_ids=ends, seed=seed, ended=ended, agree=agree):
        for row, token in step:
            written[row].append(token)
    return [_before(decode(tokenizer, tokens), how.until) for tokens in written]


def _before(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text
