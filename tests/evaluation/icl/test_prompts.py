"""Texts as llm-foundry builds them, written out by hand from its classes."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.evaluation.icl.config import ICLTaskConfig
from llmtrain.evaluation.icl.prompts import Prompt, fewshot_indices, prompts
from llmtrain.evaluation.icl.rows import Row


def built(rows: list[dict[str, Any]], shots: int, *, prefix_space: bool = True, **task: Any) -> list[Prompt]:
    cfg = ICLTaskConfig(label="x", dataset_uri="x.jsonl", num_fewshot=[shots], **task)
    return list(prompts(cfg, shots, [Row("x", row) for row in rows], prefix_space=prefix_space))


LM = [{"context": "The dog is", "continuation": "fuzzy"}, {"context": "the water is", "continuation": "hot"}]
MC = [{"query": "1 + 1 =", "choices": ["2", " 3"], "gold": 0}, {"query": "2 + 2 =", "choices": ["5", "4"], "gold": 1}]
SCHEMA = [
    {"context_options": ["A because A", "A because B"], "continuation": "was big.", "gold": 1},
    {"context_options": ["C since C", "C since D"], "continuation": "slept.", "gold": 0},
]
ANSWERS = [
    {"context": "Who?", "answer": "Ada", "aliases": ["Ada L."]},
    {"context": "2?", "answer": "4", "chain_of_thought": "1+3"},
]


def test_language_modeling() -> None:
    first, second = built(LM, 0, icl_task_type="language_modeling")
    assert (first.preamble, first.contexts, first.continuations) == ("", ("The dog is",), (" fuzzy",))
    first, second = built(LM, 1, icl_task_type="language_modeling", prompt_string="Complete:")
    # Between the prompt and the first example stands a delimiter, too; each context loses the blank at its end.
    assert first.preamble == "Complete:\nthe water is hot"
    assert first.contexts == ("\nThe dog is",)
    assert second.preamble == "Complete:\nThe dog is fuzzy"
    (one, _) = built(LM, 0, icl_task_type="language_modeling", prefix_space=False)
    assert one.continuations == ("fuzzy",)


def test_multiple_choice() -> None:
    first, _ = built(MC, 1, icl_task_type="multiple_choice", continuation_delimiter="\nAnswer: ", prelimiter="Q: ")
    assert first.preamble == "Q: 2 + 2 =\nAnswer: 4"
    assert first.contexts == ("\nQ: 1 + 1 =\nAnswer:",)
    assert first.continuations == (" 2", " 3")


def test_schema() -> None:
    first, _ = built(SCHEMA, 0, icl_task_type="schema", question_prelimiter="S: ")
    assert first.contexts == ("S: A because A", "S: A because B")
    assert first.continuations == (" was big.",)
    first, _ = built(SCHEMA, 1, icl_task_type="schema", prelimiter="S: ", prompt_string="P")
    assert first.preamble == "PS: \nC since C slept."
    assert first.contexts == ("S: \nA because A", "S: \nA because B")


def test_generated_answers_with_thoughts() -> None:
    first, second = built(ANSWERS, 1, icl_task_type="question_answering", cot_delimiter=" #### ", prelimiter="Q: ")
    assert first.preamble == "Q: 2? 1+3 #### 4"
    assert first.contexts == ("\nQ: Who?",)
    assert first.continuations == ()
    assert second.preamble == "Q: Who?  #### Ada"  # the file has thoughts, this row has none
    (one, _) = built([{**row, "chain_of_thought": None} for row in ANSWERS], 1, icl_task_type="question_answering")
    assert one.preamble == "2? 4"


@given(n=st.integers(1, 30), shots=st.integers(1, 40), seed=st.integers(0, 100), data=st.data())
def test_examples_are_other_rows_each_once(n: int, shots: int, seed: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, n - 1))
    chosen = fewshot_indices(n, shots, index, random.Random(seed))
    assert index not in chosen
    assert len(set(chosen)) == len(chosen) == min(shots, n - 1)
    assert chosen == fewshot_indices(n, shots, index, random.Random(seed))


def test_examples_are_those_that_llm_foundry_draws() -> None:
    """Computed with its get_fewshot_sample_idxs, one generator for all rows, on CPython 3.11."""
    chance = random.Random(1234)
    assert [fewshot_indices(10, 3, index, chance) for index in range(4)] == GOLDEN


GOLDEN = [[1, 9, 7], [0, 5, 8], [0, 8, 3], [0, 5, 7]]


@pytest.mark.parametrize("shots", [0, 1])
def test_each_row_is_a_question(shots: int) -> None:
    assert [prompt.row.values for prompt in built(LM, shots, icl_task_type="language_modeling")] == LM
