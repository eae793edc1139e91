import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.batch import tokens_in_batch
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.state import same_state
from llmtrain.training.algorithms import SeqLengthWarmupConfig
from llmtrain.training.length_warmup import cut, length_at, truncated


def test_lengths_grow_in_equal_steps_to_the_whole_and_stay() -> None:
    cfg = SeqLengthWarmupConfig(duration=0.5, min_seq_length=8, step_size=8)
    lengths = [length_at(cfg, step / 16, 32) for step in range(16)]
    assert lengths == [8, 8, 8, 16, 16, 16, 24, 24, *[32] * 8]
    uneven = SeqLengthWarmupConfig(duration=1.0, min_seq_length=8, step_size=20)
    assert [length_at(uneven, progress, 33) for progress in (0.0, 0.5, 0.99, 1.0)] == [8, 28, 28, 33]
    assert length_at(SeqLengthWarmupConfig(min_seq_length=64), 0.0, 64) == 64


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 3), tokens=st.integers(1, 20), length=st.integers(1, 20))
def test_no_token_is_lost_when_rows_are_cut(rows: int, tokens: int, length: int) -> None:
    ids = torch.arange(1, rows * tokens + 1).view(rows, tokens)
    batch = {"input_ids": ids, "labels": ids.clone(), "sequence_id": ids % 3, "sample_id": torch.arange(rows)}
    changed, pieces = cut(batch, length)
    assert {name: x.shape for name, x in changed.items() if x.ndim > 1 and x.shape != (rows * pieces, length)} == {}
    real = changed.get("attention_mask", torch.ones_like(changed["input_ids"])).bool()
    assert changed["input_ids"][real].tolist() == ids.flatten().tolist()
    assert changed["labels"][real].tolist() == ids.flatten().tolist()
    assert (changed["labels"][~real] == -100).all()
    assert (changed["sequence_id"][~real] == -1).all()
    assert tokens_in_batch(changed)["total"] == tokens_in_batch(batch)["total"]
    assert changed["sample_id"].tolist() == [row for row in range(rows) for _ in range(pieces)]


def test_rows_are_cut_off_and_may_keep_their_end() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 9], [1, 2, 9, 0, 0, 0], [1, 2, 3, 4, 9, 0]])
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100), "attention_mask": (ids > 0).long()}
    assert truncated(batch, 4)["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 9, 0], [1, 2, 3, 4]]
    kept = truncated(batch, 4, keep_last=True)
    assert kept["input_ids"].tolist() == [[1, 2, 3, 9], [1, 2, 9, 0], [1, 2, 3, 9]]
    assert kept["labels"].tolist() == [[1, 2, 3, 9], [1, 2, 9, -100], [1, 2, 3, 9]]
    assert ids[0, 3] == 4  # the batch itself is not changed


def test_numbers_of_packed_examples_are_no_tokens() -> None:
    ids = torch.arange(1, 25).view(3, 8)
    packed = torch.tensor([[4, 2, 7, 1, 3, 0], [5, -1, -1, -1, -1, -1], [6, 8, -1, -1, -1, -1]])
    batch = {"input_ids": ids, "labels": ids.clone(), "sample_id": packed}
    assert truncated(batch, 4, keep_last=True)["sample_id"].tolist() == packed.tolist()
    changed, pieces = cut(batch, 4)
    assert pieces == 2
    assert changed["sample_id"].tolist() == [row for row in packed.tolist() for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("truncate", "lengths"), [(False, [24, 40, 56, 64]), (True, [24, 40, 56, 64])])
def test_a_run_grows_counts_and_resumes_bit_for_bit(
    truncate: bool, lengths: list[int], corpus: TinyCorpus, tmp_path: Path
) -> None:
    warmup = {"duration": 0.75, "min_seq_length": 24, "step_size": 16, "truncate": truncate}
    recipe = tiny_recipe(
        tmp_path / "warmup.yaml",
        corpus,
        algorithms={"seq_length_warmup": warmup},
        max_duration="4ba",
        save_interval="2ba",
        eval_loader=None,
    )
    whole = launch(recipe, cwd=tmp_path)
    assert whole.code == 0, whole.output
    assert list(whole.metrics("seq_length_warmup/curr_seq_len").values()) == lengths
    rows = [8 * (1 if truncate else -(-64 // length)) for length in lengths]
    assert list(whole.metrics("seq_length_warmup/curr_bs").values()) == rows
    assert list(whole.metrics("time/sample").values()) == [0, 8, 16, 24, 32]
    tokens = [8 * (length if truncate else 64) for length in lengths]
    assert list(whole.metrics("time/token").values()) == [sum(tokens[:step]) for step in range(5)]
    if truncate:
        return
    again = tmp_path / "runs/again"
    shutil.copytree(whole.folder, again, symlinks=True)
    shutil.rmtree(again / "checkpoints/ep0-ba4")
    resumed = launch(recipe, ["run_name=again"], cwd=tmp_path)
    assert resumed.code == 0, resumed.output
    assert "step 2" in resumed.output
    assert resumed.metrics("loss/train/total") == whole.metrics("loss/train/total")
    assert same_state(whole.folder / "checkpoints/ep0-ba4", again / "checkpoints/ep0-ba4")
