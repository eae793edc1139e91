from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.training.recipe_changes import check_run, differences

HERE = Path("runs/x/checkpoints/ep0-ba4")
SAVED = {
    "model": {"d_model": 8, "resid_pdrop": 0.0, "attn_config": {"alibi": True, "attn_impl": "auto"}},
    "optimizer": {"name": "adamw", "lr": 0.1, "param_groups": []},
    "max_duration": "10ba",
}


def changed(**blocks: object) -> dict[str, object]:
    return {**SAVED, **blocks}


def test_differences_are_leaves() -> None:
    new = {"model": {"d_model": 8, "attn_config": {"alibi": False, "attn_impl": "auto"}}}
    assert differences({"model": SAVED["model"]}, new) == {
        ("model", "resid_pdrop"): (0.0, None),
        ("model", "attn_config", "alibi"): (True, False),
    }


def test_nothing_changed() -> None:
    assert check_run(SAVED, SAVED, HERE) == []


def test_what_leaves_the_function_alone_may_change() -> None:
    model = {"d_model": 8, "resid_pdrop": 0.1, "attn_config": {"alibi": True, "attn_impl": "sdpa"}}
    assert check_run(SAVED, changed(model=model), HERE) == []


def test_what_examples_see_of_each_other_may_change_and_is_said() -> None:
    model = {**SAVED["model"], "attn_config": {"alibi": True, "attn_impl": "auto", "attn_uses_sequence_id": True}}  # type: ignore[dict-item]
    (line,) = check_run(SAVED, changed(model=model), HERE)
    assert "model.attn_config.attn_uses_sequence_id None -> True" in line


def test_another_function_is_refused_by_key() -> None:
    model = {**SAVED["model"], "attn_config": {"alibi": False, "attn_impl": "auto"}}  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"model.attn_config.alibi True -> False"):
        check_run(SAVED, changed(model=model), HERE)


def test_keys_that_did_not_exist_yet_had_their_defaults() -> None:
    saved = {"name": "mpt_causal_lm", "d_model": 64, "attn_config": {"alibi": True, "rope_dail_config": None}}
    now = MPTConfig.model_validate(saved).model_dump(mode="json")
    assert check_run({"model": saved}, {"model": now}, HERE) == []
    now["attn_config"] |= {"sliding_window_size": 16, "alibi_window": "off"}
    with pytest.raises(UserError, match=r"model.attn_config.sliding_window_size -1 -> 16\."):
        check_run({"model": saved}, {"model": now}, HERE)


def test_a_key_that_alibi_makes_meaningless_may_differ() -> None:
    """An imported MPT's config.json says false, recipes leave it at true."""
    alibi = {"d_model": 64, "attn_config": {"alibi": True}}
    assert check_run({"model": {**alibi, "learned_pos_emb": False}}, {"model": alibi}, HERE) == []
    with pytest.raises(UserError, match=r"model.learned_pos_emb False -> True"):
        check_run({"model": {"d_model": 64, "learned_pos_emb": False}}, {"model": {"d_model": 64}}, HERE)


def test_another_optimizer_is_refused_and_another_rate_is_said() -> None:
    with pytest.raises(UserError, match=r"'adamw'.*'decoupled_lionw'"):
        check_run(SAVED, changed(optimizer={**SAVED["optimizer"], "name": "decoupled_lionw"}), HERE)  # type: ignore[dict-item]
    lines = check_run(SAVED, changed(optimizer={**SAVED["optimizer"], "lr": 0.2}, max_duration="20ba"), HERE)  # type: ignore[dict-item]
    assert len(lines) == 2
    assert "optimizer.lr 0.1 -> 0.2" in lines[0]
    assert "schedule" in lines[1]


def test_a_checkpoint_without_a_recipe_is_not_compared() -> None:
    assert check_run({}, {"model": {"d_model": 1}, "optimizer": {}}, HERE) == []


def test_a_folder_of_another_run_is_told() -> None:
    """A save_folder without {run_name} in it: the second run goes on from the checkpoints of the first."""
    (line,) = check_run({**SAVED, "run_name": "first"}, {**SAVED, "run_name": "second"}, HERE)
    assert line == "warning: not as in ep0-ba4: run_name first -> second"
