"""A model of ours as lm-evaluation-harness sees one. Imports the harness (extra `eval`)."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from rich.console import Console
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.evaluation.continuations import Advance, Request, dealt, in_batches, learned_positions, scores
from llmtrain.evaluation.harness_answers import Answering, answer
from llmtrain.evaluation.ranks import Ranks
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 1234
"""The harness's own, of what torch draws."""
_UNSET = 10**9
"""Tokenizers that know of no length say a larger number than this."""
_LENGTH = 2048
"""Where nothing says how long a context may be; the harness's own."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks of a model: likelihoods of continuations and of whole texts, and generated answers.

    Texts become tokens, and long contexts lose their beginning, as with the harness's own model `hf`, so that results
    agree with it. Logarithms of probabilities are computed in float32 at least, where `hf` takes the model's dtype.

    Several ranks each get all requests and share the forwards; the harness sees one rank, on each of them.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        ranks: who shares the work.
        sharded: whether they share the model as well.
        batch_tokens: of a forward, padding included.
        max_length: most tokens that the model is given; its `max_seq_len` when left out.
        console: shows the progress; None shows none.

    Raises:
        UserError: the model has fewer learned positions than `max_length`, or the tokenizer no end-of-text token.
    """

    backend = "causal"

    def __init__(
        self,
        model: MPT | HFCausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        ranks: Ranks | None = None,
        sharded: bool = False,
        batch_tokens: int = 16_384,
        max_length: int | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.what = "tasks"
        """What progress is shown as."""
        self.max_length = max_length or default_length(model, tokenizer)
        self._ranks = ranks or Ranks()
        self._sharded = sharded
        self._batch_tokens = batch_tokens
        self._console = console if self._ranks.is_first else None
        self._device = next(model.parameters()).device
        positions = learned_positions(model)
        if positions is not None and self.max_length > positions:
            raise UserError(f"max_length {self.max_length:,}: the model has {positions:,} learned positions, no more")
        if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-text token, which tasks begin with")

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the beginning of a text, or the end of the one before."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names cached requests; none are cached here."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt the last message is left open."""
        import jinja2

        def render(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return render(chat_history)
        except jinja2.TemplateError:
            # Some templates know no system prompt. The harness's `hf` leaves it out then.
            return render([message for message in chat_history if message["role"] != "system"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special ones as the tokenizer adds them, unless the text begins with the first already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, continuation): the logarithm of its probability, and whether it is what is most likely."""
        self._check_same([request.args for request in requests])
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        for texts, _context, continuation in requests:
            if not continuation and texts is not None:
                raise UserError(
                    f"{self.what}: the continuation {texts[1]!r} has no token of its own behind {texts[0][-40:]!r}: "
                    "the tokenizer joins them. Let continuations begin with a word, not inside of one"
                )
        with self._progress("scoring") as advance:
            found = scores(
                self.model,
                [Request(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                batch_tokens=self._batch_tokens,
                ranks=self._ranks,
                sharded=self._sharded,
                advance=advance,
            )
        return [(score.loglikelihood, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """For each (text,): the logarithm of its probability, in windows of `max_length` tokens where it is longer."""
        self._check_same([request.args for request in requests])
        windows, owners = [], []
        for number, request in enumerate(requests):
            for pair in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += loglikelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """For each (context, generation_kwargs): the text that follows, up to one of its stop strings."""
        self._check_same([request.args for request in requests])
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        found = [""] * len(requests)
        with self._progress("answering") as advance:
            for numbers in groups.values():
                how = Answering.of(requests[numbers[0]].args[1])
                prompts = {number: self._prompt(requests[number].args[0], how) for number in numbers}
                for number, text in self._answers(prompts, how, advance).items():
                    found[number] = text
        return found

    def _answers(self, prompts: dict[int, list[int]], how: Answering, advance: Advance) -> dict[int, str]:
        """Number of the request -> text."""
        numbers = list(prompts)
        rows = in_batches([len(ids) + how.max_new_tokens for ids in prompts.values()], self._batch_tokens)
        batches = [[numbers[row] for row in batch] for batch in rows]

        def forward(batch: list[int]) -> list[str]:
            part = {number: prompts[number] for number in batch}
            agree = _as_rank_zero if self._sharded and self._ranks.world > 1 else None
            texts = answer(self.model, self.tokenizer, part, how, seed=SEED, agree=agree)
            advance(sum(map(len, part.values())))
            return texts

        # A shared model takes one step after another on all ranks at once: each of them writes all answers.
        texts = [forward(batch) for batch in batches] if self._sharded else dealt(batches, forward, self._ranks)
        return {
            number: text
            for batch, part in zip(batches, texts, strict=True)
            for number, text in zip(batch, part, strict=True)
        }

    def _prompt(self, context: str, how: Answering) -> list[int]:
        room = self.max_length - how.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks {how.max_new_tokens:,}: answers of that length leave no room for the question in the "
                f"{self.max_length:,} tokens that the model is given. Set gen_kwargs: {{max_gen_toks: ...}}, or raise "
                "max_length"
            )
        return (self.tok_encode(context) or [self.prefix_token_id])[-room:]

    @contextmanager
    def _progress(self, doing: str) -> Iterator[Advance]:
        if self._console is None:
            yield lambda n: None
            return
        with progress(self._console, f"{self.what}: {doing}", None, "tokens") as advance:
            yield advance

    def _check_same(self, arguments: list[Any]) -> None:
        """Ranks that found other data than the first would get answers to its questions."""
        if self._ranks.world == 1:
            return
        text = json.dumps(arguments, sort_keys=True, default=str)
        if len(set(self._ranks.gather_each(hashlib.sha256(text.encode()).hexdigest()))) > 1:
            raise UserError(f"{self.what}: the ranks do not see the same questions. Is its data the same everywhere?")


def default_length(model: MPT | HFCausalLM, tokenizer: "PreTrainedTokenizerFast") -> int:
    """Tokens that a model was trained on at once, as far as is known."""
    if isinstance(model, MPT):
        return model.config.max_seq_len
    config = model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    known = getattr(tokenizer, "model_max_length", None)
    return int(known) if known is not None and known < _UNSET else _LENGTH


def _as_rank_zero(tokens: Tensor) -> Tensor:
    """A tie that two devices break differently would otherwise end in ranks that wait for each other."""
    tokens = tokens.contiguous()
    dist.broadcast(tokens, src=0)
    return tokens


def set_seeds() -> None:
    """As `lm_eval` sets them before tasks are built, so that few-shot examples are those that it draws."""
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(SEED)  # what the harness's tasks draw from
    torch.manual_seed(SEED)
