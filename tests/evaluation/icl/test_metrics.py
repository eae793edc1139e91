"""Numbers that were computed by hand."""

import math

import pytest

from llmtrain.evaluation.icl.answers import is_right, normalized
from llmtrain.evaluation.icl.config import GauntletConfig
from llmtrain.evaluation.icl.gauntlet import averages
from llmtrain.evaluation.icl.metrics import (
    Outcome,
    Scored,
    accuracy,
    calibration_error,
    of_choices,
    of_language_modeling,
    standard_error,
)

BENCHMARKS = {
    "know": [("mmlu", 5, 0.25), ("qa", 3, 0.0)],
    "read": [("boolq", 0, 0.5)],
    "gone": [("boolq", 0, 0.5), ("missing", 0, 0.0)],
}
ACCURACIES = {"mmlu/5-shot/law": 0.5, "mmlu/5-shot/art": 0.3, "qa/3-shot": 0.2, "qa/30-shot": 1.0, "boolq/0-shot": 0.6}
SIZES = {"mmlu/5-shot/law": 100, "mmlu/5-shot/art": 28, "qa/3-shot": 16, "qa/30-shot": 5, "boolq/0-shot": 9}


def gauntlet(**settings: object) -> GauntletConfig:
    categories = [
        {"name": name, "benchmarks": [{"name": n, "num_fewshot": k, "random_baseline": b} for n, k, b in benchmarks]}
        for name, benchmarks in BENCHMARKS.items()
    ]
    return GauntletConfig.model_validate({"categories": categories, **settings})


def test_categories_and_averages() -> None:
    said: list[str] = []
    found = averages(gauntlet(averages={"core": ["know", "read"], "lost": ["gone"]}), ACCURACIES, SIZES, said.append)
    # mmlu (0.5 + 0.3) / 2 = 0.4 -> (0.4 - 0.25) / 0.75 = 0.2; qa 0.2; boolq (0.6 - 0.5) / 0.5 = 0.2
    assert found == pytest.approx({"know": 0.2, "read": 0.2, "core": 0.2})
    assert said == [
        "eval_gauntlet: category gone is left out: no result of missing/0-shot",
        "eval_gauntlet: average lost is left out: none of its categories has a result",
    ]
    assert averages(gauntlet(), ACCURACIES, SIZES)["default_average"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("EQUAL", 0.3), ("SAMPLE_SZ", (0.4 * 128 + 0.2 * 16) / 144), ("LOG_SAMPLE_SZ", (0.4 * 7 + 0.2 * 4) / 11)],
)
def test_weighting(weighting: str, expected: float) -> None:
    cfg = gauntlet(weighting=weighting, subtract_random_baseline=False, rescale_accuracy=False)
    assert averages(cfg, ACCURACIES, SIZES)["know"] == pytest.approx(expected)
    assert averages(gauntlet(rescale_accuracy=False), ACCURACIES, SIZES)["know"] == pytest.approx((0.15 + 0.2) / 2)


def test_choices_are_compared_by_perplexity_per_token() -> None:
    scored = [Scored(2.0, 0.3, False), Scored(1.5, 0.2, True), Scored(1.5, 0.5, False)]
    outcome = of_choices(scored, gold=1)
    assert (outcome.right, outcome.answer) == (True, 1)
    assert (outcome.sure_of, outcome.confidence) == (False, 0.5)  # surest by probability is the third
    assert not of_choices(scored, gold=2).right
    assert of_choices([Scored(900.0, 0.0, False)] * 2, gold=0).confidence == 0.5  # nothing is probable


def test_language_modeling_wants_every_token() -> None:
    assert of_language_modeling([Scored(1.0, 0.5, True, 0.4)]) == Outcome(True, True, 0.4)
    assert not of_language_modeling([Scored(0.1, 0.9, False)]).right


def test_calibration_error() -> None:
    outcomes = [Outcome(True, True, 0.95), Outcome(True, False, 1.0), Outcome(False, True, 0.12)]
    # bucket 9: 2 of 3, accuracy 1/2 against 0.95; bucket 1: accuracy 1 against 0.15
    assert calibration_error(outcomes) == pytest.approx(2 / 3 * 0.45 + 1 / 3 * 0.85)
    assert accuracy(outcomes) == pytest.approx(2 / 3)
    assert standard_error(outcomes) == pytest.approx(math.sqrt(2 / 9 / 2))
    assert standard_error(outcomes[:1]) is None


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        (" The Eiffel-Tower.", True),
        (" eiffel tower in Paris", True),
        (" an Eiffel", False),
        (" I think: #### Eiffel Tower", True),
        (" Eiffel Tower #### the Louvre", False),
        (" no\nQ: #### Eiffel Tower", False),  # behind the end of the answer
        ("", False),
    ],
)
def test_answers(generated: str, right: bool) -> None:
    how = {"stops": ["\nQ:"], "cot_delimiter": "####", "normalize": True}
    assert is_right(generated, ["Eiffel Tower", "."], **how) == right


@pytest.mark.parametrize(("generated", "right"), [(" A", True), (" A. Paris", True), (" B", False), (" Apple", False)])
def test_an_answer_that_is_an_article(generated: str, right: bool) -> None:
    assert is_right(generated, ["A"], stops=[], cot_delimiter="", normalize=True) == right


def test_answers_as_they_stand() -> None:
    how = {"stops": [], "cot_delimiter": "", "normalize": False}
    assert is_right(" The Tower", ["The"], **how)
    assert not is_right(" the Tower", ["The"], **how)
    assert normalized("The_quick  (brown) fox’s a!") == "quick brown fox s"
