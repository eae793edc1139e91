"""Samples from fixed prompts while the model is trained: what a loss does not show."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer import Callback, Event, Logger, State
from composer.core import get_precision_context
from composer.utils import dist, model_eval_mode
from composer.utils.misc import create_interval_scheduler
from torch import nn

from llmtrain.errors import UserError
from llmtrain.generation.conversation import encode, render
from llmtrain.generation.decoder import decoder_for
from llmtrain.generation.samples import SamplePrompt, sample
from llmtrain.generation.sampling import Sampling
from llmtrain.training.environment import say_each
from llmtrain.training.rows_by_step import add_rows, forget_later_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtrain.generation.prompts import Completion

SAMPLES = "samples.jsonl"
"""In the run's folder: one object a sample, with `step`, `prompt`, `completion` and `finish_reason`."""


class GenerateCallback(Callback):  # type: ignore[misc]
    """Continues the prompts after each evaluation, or every `interval`.

    Composer's callback of that name takes only models of its own HuggingFaceModel class. Here all ranks take part, so
    that a sharded model can, and no random state is touched: training goes on as without the samples.

    Samples go to the console, to samples.jsonl and, as a table, to the loggers. A resumed run that comes past the same
    step again replaces what stands there.

    The settings are those of `llmtrain.training.callbacks.GenerateConfig`.
    """

    def __init__(
        self,
        prompts: Sequence[str | Mapping[str, str] | Sequence[Mapping[str, str]]],
        interval: str | None = None,
        batch_size: int | None = None,
        max_new_tokens: int = 64,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        use_cache: bool = True,
    ) -> None:
        self._given = prompts
        self.prompts: list[SamplePrompt] = []
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.batch_size = batch_size or len(prompts)
        chance = do_sample if do_sample is not None else any(x is not None for x in (temperature, top_k, top_p))
        self.sampling = Sampling(
            temperature=(1.0 if temperature is None else temperature) if chance else 0.0,
            top_k=top_k or 0,
            top_p=1.0 if top_p is None else top_p,
        )
        self._is_due = None
        if interval is not None:
            self._is_due = create_interval_scheduler(
                interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
            )
        self._step: int | None = None
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._file: Path | None = None

    def attach(self, tokenizer: "PreTrainedTokenizerFast", folder: Path, conversations: bool) -> None:
        """Gives it the run's tokenizer and folder, and says whether a plain prompt is a user's turn or a text."""
        self._tokenizer, self._file = tokenizer, folder / SAMPLES
        self.prompts = [_prompt(prompt, conversations) for prompt in self._given]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Says before the first step what could not work at the first sample."""
        if self._is_due is None and not state.evaluators:
            raise UserError(
                "callbacks.generate_callback: samples are taken at each evaluation, and this run has none. "
                "Set its `interval`, or an eval_loader."
            )
        assert self._tokenizer is not None
        positions = decoder_for(_language_model(state)).positions
        for number, prompt in enumerate(self.prompts, start=1):
            text = prompt if isinstance(prompt, str) else render(self._tokenizer, prompt)
            length = len(encode(self._tokenizer, text))
            if positions is not None and length + self.max_new_tokens - 1 > positions:
                raise UserError(
                    f"callbacks.generate_callback: prompt {number} has {length} tokens, and with max_new_tokens "
                    f"{self.max_new_tokens} they do not fit into the model's {positions} positions. Shorten either."
                )

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        if self._is_due is None:
            due = event in (Event.EVAL_AFTER_ALL, Event.EVAL_STANDALONE_END)
        else:
            due = event in (Event.BATCH_END, Event.EPOCH_END) and self._is_due(state, event)
        if due and self._step != int(state.timestamp.batch):
            self._step = int(state.timestamp.batch)
            self._generate(state, logger, self._step)

    def after_load(self, state: State, logger: Logger) -> None:
        """Drops the samples of steps that are going to be taken again."""
        step = int(state.timestamp.batch)
        if dist.get_global_rank() == 0 and self._file is not None:
            forget_later_rows(self._file, step)

    def _generate(self, state: State, logger: Logger, step: int) -> None:
        assert self._tokenizer is not None
        done: list[Completion] = []
        with model_eval_mode(state.model), get_precision_context(state.precision):
            for start in range(0, len(self.prompts), self.batch_size):
                done += sample(
                    _language_model(state),
                    self._tokenizer,
                    self.prompts[start : start + self.batch_size],
                    max_new_tokens=self.max_new_tokens,
                    sampling=self.sampling,
                    seed=self.seed + start,
                )
        rows = [{"step": step, **completion.as_json()} for completion in done]
        say_each(line for row in rows for line in _shown(row))
        if dist.get_global_rank() != 0:
            return
        if self._file is not None:
            add_rows(self._file, step, rows)
        columns = ["step", "prompt", "completion", "finish_reason"]
        logger.log_table(columns, [[row[key] for key in columns] for row in rows], name="generations", step=step)


def _prompt(given: str | Mapping[str, str] | Sequence[Mapping[str, str]], conversations: bool) -> SamplePrompt:
    if isinstance(given, Mapping):
        return given["text"]
    return [{"role": "user", "content": given}] if isinstance(given, str) and conversations else given


def _language_model(state: State) -> nn.Module:
    """The module that FSDP has sharded as the root: what `llmtrain.training.language_model` wraps."""
    model: nn.Module = (state.model.module if state.is_model_ddp else state.model).model
    return model


def _shown(row: Mapping[str, Any]) -> list[str]:
    """A sample for the console; newlines and control characters as escapes, one line each for prompt and answer."""
    prompt, completion = (json.dumps(row[key], ensure_ascii=False)[1:-1] for key in ("prompt", "completion"))
    prompt = prompt if len(prompt) <= 100 else f"...{prompt[-97:]}"
    ends = "" if row["finish_reason"] == "stop" else " ..."
    return [f"sample      step {row['step']}  {prompt}", f"            -> {completion}{ends}"]
