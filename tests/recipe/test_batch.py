import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.recipe.batch import batch_plan
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.recipe import Recipe


def recipe_with(total: int, microbatch: int, evaluation: int | None = None) -> Recipe:
    return Recipe.model_construct(
        global_train_batch_size=total, device_train_microbatch_size=microbatch, device_eval_batch_size=evaluation
    )


def test_a_loaded_recipe(write) -> None:
    plan = batch_plan(load_recipe(write()), 2)
    assert (plan.device_batch_size, plan.microbatch_size, plan.accumulation_steps) == (8, 4, 2)
    assert plan.device_eval_batch_size == 4
    assert plan.notes == ()


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_every_sample_is_in_one_pass(per_rank: int, ranks: int, microbatch: int) -> None:
    plan = batch_plan(recipe_with(per_rank * ranks, microbatch), ranks)
    assert plan.device_batch_size * ranks == per_rank * ranks
    assert plan.microbatch_size <= plan.device_batch_size
    assert (plan.accumulation_steps - 1) * plan.microbatch_size < plan.device_batch_size
    assert plan.accumulation_steps * plan.microbatch_size >= plan.device_batch_size
    assert bool(plan.notes) == (microbatch > per_rank)


def test_a_micro_batch_that_is_too_large_is_cut_and_said() -> None:
    plan = batch_plan(recipe_with(8, 16, evaluation=3), 4)
    assert (plan.microbatch_size, plan.accumulation_steps, plan.device_eval_batch_size) == (2, 1, 3)
    assert "16 is more than the 2 sample(s) of a rank" in plan.notes[0]


def test_the_next_sizes_that_work_are_named() -> None:
    with pytest.raises(UserError) as caught:
        batch_plan(recipe_with(1760, 4), 64)
    message = str(caught.value)
    assert "1760 samples cannot be split over 64 ranks" in message
    assert "1728 or 1792" in message
    assert "40, 44, 55, 80" in message
    with pytest.raises(UserError, match="sizes that can: 8;"):
        batch_plan(recipe_with(3, 1), 8)


def test_ranks_that_share_sequences_are_one_to_the_batch() -> None:
    recipe = recipe_with(8, 2).model_copy(update={"sequence_parallel_degree": 2})
    plan = batch_plan(recipe, 8)
    assert (plan.device_batch_size, plan.accumulation_steps, plan.sequence_parallel_degree) == (2, 1, 2)
    with pytest.raises(UserError, match="7 ranks cannot be grouped by 2"):
        batch_plan(recipe, 7)
    with pytest.raises(UserError, match=r"over 3 groups of 2 ranks\. Next sizes that can: 6 or 9.* 2, 4, 8, 16"):
        batch_plan(recipe, 6)
