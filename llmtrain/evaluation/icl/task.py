"""A task with one number of examples (and of one category), ready to be put to a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from llmtrain.errors import UserError
from llmtrain.evaluation.icl import metrics
from llmtrain.evaluation.icl.answers import is_right
from llmtrain.evaluation.icl.config import LM_ECE, MC_ECE, ICLConfig, ICLTaskConfig
from llmtrain.evaluation.icl.encode import Encoder, Question, last
from llmtrain.evaluation.icl.metrics import Outcome
from llmtrain.evaluation.icl.prompts import prompts
from llmtrain.evaluation.icl.rows import Row, by_category, read_rows
from llmtrain.evaluation.icl.score import Advance, generate_answers, score_pairs
from llmtrain.evaluation.ranks import Ranks
from llmtrain.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_task_with_answers"


@dataclass(frozen=True)
class TaskScores:
    """What a model reached; the same on all ranks."""

    values: dict[str, float]
    """By name of the metric."""
    outcomes: list[Outcome]
    """Of each question, in the order of the file."""


@dataclass
class Task:
    """One of the things that an evaluation of tasks reports."""

    cfg: ICLTaskConfig
    num_fewshot: int
    category: str
    """`""` where the task has none."""
    rows: list[Row]
    """All questions: examples are drawn from these."""
    n_questions: int
    """The first so many are put."""
    max_seq_len: int
    batch_size: int
    encoder: Encoder
    _encoded: dict[int, Question] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`LABEL/N-shot`, or `LABEL/N-shot/CATEGORY`."""
        return f"{self.cfg.label}/{self.num_fewshot}-shot" + (f"/{self.category}" if self.category else "")

    @property
    def random_baseline(self) -> float | None:
        """The accuracy of guessing, where there are choices."""
        key = {"multiple_choice": "choices", "schema": "context_options"}.get(self.cfg.icl_task_type)
        if key is None:
            return None
        return sum(1 / len(row.texts(key)) for row in self.rows[: self.n_questions]) / self.n_questions

    @cached_property
    def answer_length(self) -> int:
        """Tokens of a generated answer, at most."""
        return self.cfg.generation_kwargs.max_new_tokens or self.encoder.longest_answer(self.cfg, self.rows)

    @property
    def context_length(self) -> int:
        """Tokens of a context before a generated answer, at most."""
        return max(self.max_seq_len - self.answer_length, 1)

    def prepare(self, numbers: Sequence[int]) -> None:
        """Tokenize some of the questions, by number; they are kept.

        Raises:
            UserError: an answer is empty or too long.
        """
        missing = set(numbers) - self._encoded.keys()
        if not missing:
            return
        texts = prompts(self.cfg, self.num_fewshot, self.rows, prefix_space=self.encoder.prefix_space)
        for number, prompt in enumerate(texts):
            if number in missing:
                self._encoded[number] = self.encoder.question(prompt, self.max_seq_len, self.label)

    def evaluate(
        self, model: nn.Module, ranks: Ranks, *, sharded: bool, advance: Advance = lambda n: None
    ) -> TaskScores:
        """Put the questions to a model (a collective call).

        Args:
            model: in evaluation mode.
            ranks: who takes part: each answers its share of the questions.
            sharded: the ranks need each other in every forward.
            advance: is told about sequences that are done on this rank.
        """
        if self.cfg.icl_task_type == GENERATION:
            outcomes = self._generate(model, ranks, sharded, advance)
        else:
            outcomes = self._score(model, ranks, sharded, advance)
        values = {}
        for name in self.cfg.metrics:
            is_ece = name in (LM_ECE, MC_ECE)
            values[name] = metrics.calibration_error(outcomes) if is_ece else metrics.accuracy(outcomes)
        return TaskScores(values, outcomes)

    def sequences(self, ranks: Ranks, *, sharded: bool) -> int:
        """How many of them `evaluate` reports as done on this rank."""
        numbers = range(self.n_questions) if self._all_generate(sharded) else ranks.deal(self.n_questions)
        self.prepare(numbers)
        return sum(len(self._encoded[n].contexts) if self._is_generated else self._n_pairs(n) for n in numbers)

    def shown(self, number: int) -> tuple[str, list[str]]:
        """A question as the model saw it, decoded: its context (the first of several), and what was scored."""
        self.prepare([number])
        question, decode = self._encoded[number], self.encoder.tokenizer.decode
        if self._is_generated:
            return str(decode(last(question.contexts[0], self.context_length))), []
        pairs = list(question.pairs(self.max_seq_len))
        ends = [str(decode(pair.continuation)) for pair in pairs]
        if len(question.contexts) > 1:  # a schema task: it is the contexts that differ
            ends = [str(decode(pair.context)) + end for pair, end in zip(pairs, ends, strict=True)]
        return str(decode(pairs[0].context)), ends

    @property
    def _is_generated(self) -> bool:
        return self.cfg.icl_task_type == GENERATION

    def _all_generate(self, sharded: bool) -> bool:
        return self._is_generated and sharded

    def _n_pairs(self, number: int) -> int:
        question = self._encoded[number]
        return max(len(question.contexts), len(question.continuations))

    def _score(self, model: nn.Module, ranks: Ranks, sharded: bool, advance: Advance) -> list[Outcome]:
        mine = ranks.deal(self.n_questions)
        self.prepare(mine)
        per_question = [list(self._encoded[number].pairs(self.max_seq_len)) for number in mine]
        scored = iter(
            score_pairs(
                model,
                [pair for pairs in per_question for pair in pairs],
                batch_size=self.batch_size,
                ranks=ranks,
                sharded=sharded,
                confidence=LM_ECE in self.cfg.metrics,
                advance=advance,
            )
        )
        outcomes = []
        for number, pairs in zip(mine, per_question, strict=True):
            of_this = [next(scored) for _ in pairs]
            if self.cfg.icl_task_type == "language_modeling":
                outcomes.append(metrics.of_language_modeling(of_this))
            else:
                outcomes.append(metrics.of_choices(of_this, self.rows[number].gold))
        return ranks.gather(outcomes)

    def _generate(self, model: nn.Module, ranks: Ranks, sharded: bool, advance: Advance) -> list[Outcome]:
        mine = range(self.n_questions) if sharded else ranks.deal(self.n_questions)
        self.prepare(mine)
        cfg, how = self.cfg, self.cfg.generation_kwargs
        sampling = Sampling(0)
        if how.do_sample:
            sampling = Sampling(1.0 if how.temperature is None else how.temperature, how.top_k or 0, how.top_p or 1.0)
        tokenizer = self.encoder.tokenizer
        ends = how.eos_token_id if how.eos_token_id is not None else tokenizer.eos_token_id
        texts = generate_answers(
            model,
            tokenizer,
            [last(self._encoded[number].contexts[0], self.context_length) for number in mine],
            max_new_tokens=self.answer_length,
            sampling=sampling,
            eos_ids=[] if ends is None else [int(ends)],
            stops=cfg.early_stopping_criteria,
            seeds=list(mine),
            batch_size=self.batch_size,
            sharded=sharded,
            advance=advance,
        )
        outcomes = []
        for number, text in zip(mine, texts, strict=True):
            row = self.rows[number]
            right = is_right(
                text,
                {row.text("answer"), *row.texts("aliases")},
                stops=cfg.early_stopping_criteria,
                cot_delimiter=cfg.cot_delimiter,
                normalize=cfg.do_normalization,
            )
            outcomes.append(Outcome(right, answer=text))
        return outcomes if sharded else ranks.gather(outcomes)


def build_tasks(
    cfg: ICLConfig,
    tokenizer: "PreTrainedTokenizerFast",
    ranks: Ranks,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Task]:
    """All tasks of a configuration, their questions read, checked, and tokenized as far as they are this rank's.

    Raises:
        UserError: a file is missing, or one of its rows is no question of its type.
    """
    if cfg.icl_subset_num_batches == 0:
        raise UserError("icl_subset_num_batches: 0 leaves no question. Give a number, or -1 for all.")
    encoder = Encoder(tokenizer)
    tasks = [task for one in cfg.icl_tasks for task in _of(one, cfg, encoder, ranks)]
    for task in tasks:
        task.prepare(ranks.deal(task.n_questions))
        if task.n_questions < len(task.rows):
            say(f"{task.label}: the first {task.n_questions:,} of {len(task.rows):,} questions")
    return tasks


def _of(one: ICLTaskConfig, cfg: ICLConfig, encoder: Encoder, ranks: Ranks) -> Iterator[Task]:
    rows = read_rows(one)
    max_seq_len, batch_size = one.max_seq_len or cfg.icl_seq_len, one.batch_size or cfg.device_eval_batch_size
    for num_fewshot in one.num_fewshot:
        for category, part in by_category(one, rows).items():
            n_questions = len(part)
            if cfg.icl_subset_num_batches >= 0:
                # A question with its choices is never parted, so a batch of llm-foundry's holds that many of them.
                questions = max(1, batch_size // _n_choices(part[0]))
                n_questions = min(n_questions, cfg.icl_subset_num_batches * questions * ranks.world)
            yield Task(one, num_fewshot, category, part, n_questions, max_seq_len, batch_size, encoder)


def _n_choices(row: Row) -> int:
    found: Any = row.values.get("choices") or row.values.get("context_options") or (None,)
    return len(found)
