"""A certificate is refused where a resume lies, and names the first thing that is not the same."""

from pathlib import Path
from typing import Any

import pytest

from llmtrain.certify.certificate import Certificate
from tests.certify.conftest import Certify

pytestmark = pytest.mark.slow

RANDOM_STATE_IS_LOST = """
from llmtrain.training.composer_adapter import RestoreRNG
RestoreRNG._restore = lambda self, state: None
"""

DATA_MOVES_BY_ONE = """
from llmtrain.data.text import TextDataset
loads, reads = TextDataset.load_state_dict, TextDataset.get_item

def load(self, obj):
    self.moved = 1
    loads(self, obj)

def read(self, sample_id, retry=7):
    return reads(self, (sample_id + getattr(self, "moved", 0)) % self.num_samples, retry)

TextDataset.load_state_dict, TextDataset.get_item = load, read
"""

A_BIT_FLIPS = """
import torch
from llmtrain.training.step_record import StepRecord
loaded = StepRecord.after_load

def after_load(self, state, logger):
    if int(state.timestamp.batch) > 0:
        weight = dict(state.model.named_parameters())["model.transformer.norm_f.weight"]
        getattr(weight.data, "_local_tensor", weight.data).view(torch.int32)[3] ^= 1
    loaded(self, state, logger)

StepRecord.after_load = after_load
"""

IT_STOPS = """
from llmtrain.training.step_record import StepRecord
loaded = StepRecord.after_load

def after_load(self, state, logger):
    if int(state.timestamp.batch) > 0:
        raise RuntimeError("no second time")
    loaded(self, state, logger)

StepRecord.after_load = after_load
"""


@pytest.fixture
def lie(certify: Certify, base_twin: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The certificate of a recipe whose runs do something wrong after a resume."""
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")

    def run(code: str) -> Certificate:
        (tmp_path / "wrong.py").write_text(code)
        recipe, *overrides = base_twin
        wrong = ["code_paths=[wrong.py]", "save_interval=1ba", "eval_loader=null"]
        return certify(recipe, *overrides, *wrong, ranks=1, kills=6, steps=8, other_ranks="none", seed=5)

    return run


@pytest.mark.parametrize(
    ("code", "keys"),
    [
        (RANDOM_STATE_IS_LOST, ("random state of rank 0",)),
        pytest.param(DATA_MOVES_BY_ONE, ("samples of rank 0",), marks=pytest.mark.long),
        pytest.param(A_BIT_FLIPS, ("loss/train/total", "state.model."), marks=pytest.mark.long),
    ],
)
def test_the_first_difference_is_found_and_named(lie: Any, code: str, keys: tuple[str, ...]) -> None:
    made: Certificate = lie(code)
    assert not made.granted
    assert made.difference is not None, made.problem
    assert made.difference.key.startswith(keys)
    assert made.difference.undisturbed != made.difference.disturbed
    assert made.resumed[-1] > 0
    if made.difference.where.startswith("step "):  # the first step that was resumed, or where a bit shows
        assert f"after kill {len(made.kills)} (" in made.difference.where
        step = int(made.difference.where.split()[1].rstrip(","))
        assert step == made.resumed[-1] + 1 or code == A_BIT_FLIPS


@pytest.mark.long
def test_a_run_that_does_not_come_back_is_shown_with_its_last_words(lie: Any) -> None:
    made: Certificate = lie(IT_STOPS)
    assert not made.granted
    assert made.problem is not None
    assert "no second time" in made.problem
    assert "exit codes [1]" in made.problem
