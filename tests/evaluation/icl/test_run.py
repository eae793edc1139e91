"""Scores: against logits, for any batch, length and number of ranks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from llmtrain.errors import UserError
from llmtrain.evaluation.icl.config import ICLConfig, ICLTaskConfig
from llmtrain.evaluation.icl.encode import Encoder, Pair, Question, last
from llmtrain.evaluation.icl.metrics import Scored
from llmtrain.evaluation.icl.run import run_icl
from llmtrain.evaluation.icl.score import generate_answers, score_pairs
from llmtrain.evaluation.icl.task import build_tasks
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.results import TaskResults
from llmtrain.generation.sampling import Sampling
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.testing.ranks import run_ranks

ALONE = Ranks()


def ids(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int32)


def run(model: MPT, words: PreTrainedTokenizerFast, cfg: ICLConfig, ranks: Ranks = ALONE, **how: bool) -> TaskResults:
    return run_icl(model, words, cfg, ranks, sharded=how.get("sharded", False), console=Console(file=io.StringIO()))


def by_hand(model: MPT, pair: Pair) -> Scored:
    """From all logits of the pair alone."""
    tokens = torch.from_numpy(np.concatenate([pair.context, pair.continuation])).long()[None]
    with torch.no_grad():
        logs = model(tokens).logits[0, len(pair.context) - 1 : -1].log_softmax(-1)
    target = tokens[0, len(pair.context) :, None]
    losses = -logs.gather(1, target)
    greedy = bool((logs.argmax(-1) == target[:, 0]).all())
    return Scored(float(losses.mean()), float((-losses).exp().mean()), greedy, float(logs.amax(-1).exp().min()))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=9),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_scores_are_those_of_each_pair_alone(
    model: MPT, lengths: list[tuple[int, int]], batch_size: int, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    pairs = [Pair(chance.integers(0, 300, n, np.int32), chance.integers(0, 300, k, np.int32)) for n, k in lengths]
    expected = [by_hand(model, pair) for pair in pairs]
    for confidence in (False, True):
        found = score_pairs(model, pairs, batch_size=batch_size, ranks=ALONE, sharded=False, confidence=confidence)
        for one, other in zip(found, expected, strict=True):
            assert one.greedy == other.greedy
            assert (one.loss, one.probability) == pytest.approx((other.loss, other.probability), rel=1e-4, abs=1e-7)
            assert one.confidence == (pytest.approx(other.confidence, rel=1e-4) if confidence else None)


def test_what_the_model_would_write_is_greedy(model: MPT, words: PreTrainedTokenizerFast) -> None:
    how = {"max_new_tokens": 4, "sampling": Sampling(0), "eos_ids": [], "stops": [], "sharded": False}
    context = ids(40, 50, 60)
    with torch.no_grad():
        written = context
        for _ in range(4):
            following = model(torch.from_numpy(written)[None].long()).logits[0, -1].argmax()
            written = np.append(written, np.int32(following))
    pair = Pair(context, written[3:])
    (found,) = score_pairs(model, [pair], batch_size=1, ranks=ALONE, sharded=False)
    assert found.greedy
    wrong = Pair(context, np.append(pair.continuation[:-1], np.int32(pair.continuation[-1] ^ 1)))
    assert not score_pairs(model, [wrong], batch_size=1, ranks=ALONE, sharded=False)[0].greedy
    (text,) = generate_answers(model, words, [context], seeds=[0], batch_size=1, **how)
    assert text == words.decode(pair.continuation)


@given(context=st.integers(1, 50), end=st.integers(1, 20), length=st.integers(2, 60))
def test_what_is_too_long_loses_its_beginning(context: int, end: int, length: int) -> None:
    question = Question(None, (np.arange(context, dtype=np.int32),), (np.arange(100, 100 + end, dtype=np.int32),))  # type: ignore[arg-type]
    if end >= length:
        return  # refused when it is encoded
    (pair,) = question.pairs(length)
    assert pair.continuation.tolist() == list(range(100, 100 + end))
    assert len(pair) == min(length, context + end)
    assert pair.context.tolist() == list(range(context))[-(length - end) :]
    assert len(last(ids(1, 2, 3), 0)) == 0


def test_answers_without_room_and_without_context(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    rows = [{"context": "", "continuation": "word"}, {"context": "a", "continuation": "none of them " * 9}]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = ICLTaskConfig(label="t", dataset_uri=str(file), num_fewshot=[0], icl_task_type="language_modeling")
    (one,) = build_tasks(ICLConfig(icl_tasks=(task,)), words, ALONE)
    one.prepare([0])
    assert one._encoded[0].contexts[0].tolist() == [words.eos_token_id]  # the first token is scored, too
    with pytest.raises(UserError, match=r"x.jsonl, line 2: an answer has \d+ tokens, and with a context they do not"):
        build_tasks(ICLConfig(icl_tasks=(task,), icl_seq_len=8), words, ALONE)


def test_all_types_in_batches_of_any_size(model: MPT, words: PreTrainedTokenizerFast, shipped: ICLConfig) -> None:
    found = run(model, words, shipped)
    assert [f"{row.label} {row.metric[len('InContextLearning') :]} {row.n}" for row in found.rows] == [
        "python_completions/0-shot LMAccuracy 10",
        "python_completions/0-shot LMExpectedCalibrationError 10",
        "python_completions/3-shot LMAccuracy 10",
        "python_completions/3-shot LMExpectedCalibrationError 10",
        "general_knowledge/2-shot MultipleChoiceAccuracy 10",
        "general_knowledge/2-shot MCExpectedCalibrationError 10",
        "general_knowledge/nature/2-shot MultipleChoiceAccuracy 5",
        "general_knowledge/nature/2-shot MCExpectedCalibrationError 5",
        "general_knowledge/places/2-shot MultipleChoiceAccuracy 5",
        "general_knowledge/places/2-shot MCExpectedCalibrationError 5",
        "pronouns/0-shot MultipleChoiceAccuracy 8",
        "python_answers/2-shot GenerationExactMatchAccuracy 8",
    ]
    nature, places = (row.value for row in found.rows[6:10:2])
    assert found.rows[4].value == (nature + places) / 2
    pronouns, answers = found.rows[10].value, found.rows[11].value
    assert found.averages["common_sense"] == pytest.approx(
        ((found.rows[4].value - 0.25) / 0.75 + (pronouns - 0.5) / 0.5) / 2
    )
    assert found.averages["programming"] == pytest.approx((found.rows[2].value + answers) / 2)
    assert found.averages["all"] == pytest.approx((found.averages["programming"] + found.averages["common_sense"]) / 2)
    assert (found.rows[10].random_baseline, found.rows[5].higher_is_better) == (0.5, False)
    other = run(model, words, shipped.model_copy(update={"device_eval_batch_size": 3}))
    assert other == found


def test_a_part_of_the_questions(model: MPT, words: PreTrainedTokenizerFast, shipped: ICLConfig) -> None:
    cfg = shipped.model_copy(update={"icl_subset_num_batches": 1, "device_eval_batch_size": 6})
    tasks = {task.label: task for task in build_tasks(cfg, words, ALONE)}
    assert tasks["python_completions/0-shot"].n_questions == 6
    assert tasks["general_knowledge/2-shot/nature"].n_questions == 1  # of four choices
    assert tasks["pronouns/0-shot"].n_questions == 3
    whole = {task.label: task for task in build_tasks(shipped, words, ALONE)}["python_completions/3-shot"]
    part = tasks["python_completions/3-shot"]
    whole.prepare([5])
    part.prepare([5])
    with pytest.raises(UserError, match="0 leaves no question"):
        build_tasks(cfg.model_copy(update={"icl_subset_num_batches": 0}), words, ALONE)
    assert whole._encoded[5].contexts[0].tolist() == part._encoded[5].contexts[0].tolist()  # the same examples
    assert len(run(model, words, cfg).rows) == 12


def _on_ranks(cfg: ICLConfig, state: dict[str, torch.Tensor], config: object, tokenizer: str) -> list[TaskResults]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from llmtrain.evaluation import ranks as ranks_of
    from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

    ranks, words = ranks_of.start("cpu"), load_tokenizer(TokenizerConfig(name=tokenizer))
    model = MPT(config).eval()  # type: ignore[arg-type]
    model.load_state_dict(state)
    whole = run(model, words, cfg, ranks)
    for block in model.transformer.blocks:
        fully_shard(block)
    fully_shard(model)
    assert isinstance(next(model.parameters()), DTensor)
    return [whole, run(model, words, cfg, ranks, sharded=True)]


def test_two_ranks_whole_and_sharded(model: MPT, words: PreTrainedTokenizerFast, shipped: ICLConfig, corpus) -> None:
    # Three sequences a batch, so that one rank has fewer batches than the other.
    some = tuple(task for task in shipped.icl_tasks if task.label != "general_knowledge")
    update = {"device_eval_batch_size": 3, "icl_tasks": some, "eval_gauntlet": None}
    cfg = shipped.model_copy(update=update)
    expected = run(model, words, cfg)
    found = run_ranks(_on_ranks, 2, cfg, model.state_dict(), model.config, str(corpus.tokenizer))
    assert found == [[expected, expected]] * 2


def test_sampled_answers_do_not_depend_on_the_batch(model: MPT, words: PreTrainedTokenizerFast) -> None:
    contexts = [ids(*range(3, 3 + n)) for n in (4, 9, 2, 6)]
    how = {"max_new_tokens": 5, "sampling": Sampling(1.0), "eos_ids": [0], "stops": [], "sharded": False}
    whole = generate_answers(model, words, contexts, seeds=[7, 8, 9, 10], batch_size=4, **how)
    assert len(set(whole)) > 1
    assert generate_answers(model, words, contexts, seeds=[7, 8, 9, 10], batch_size=3, **how) == whole
    some = generate_answers(model, words, contexts[::2], seeds=[7, 9], batch_size=1, **how)
    assert some == whole[::2]


def test_an_answer_ends_with_a_stop(model: MPT, words: PreTrainedTokenizerFast) -> None:
    how = {"max_new_tokens": 12, "sampling": Sampling(0), "eos_ids": [], "sharded": False, "seeds": [0]}
    (whole,) = generate_answers(model, words, [ids(40, 50)], stops=[], batch_size=1, **how)
    stop = whole[3:5]
    (cut,) = generate_answers(model, words, [ids(40, 50)], stops=[stop], batch_size=1, **how)
    assert stop in cut
    assert len(cut) < len(whole)


def test_prefix_space_where_words_have_one(words: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(words)
    assert encoder.prefix_space == (len(words(" a")["input_ids"]) == 1)


def test_a_model_with_learned_positions_says_what_does_not_fit(
    model: MPT, words: PreTrainedTokenizerFast, shipped: ICLConfig
) -> None:
    short = MPT(MPTConfig.model_validate({**model.config.model_dump(), "attn_config": {}})).eval()
    with pytest.raises(UserError, match="96: the model has 64 learned positions"):
        run(short, words, shipped)


def test_a_model_of_transformers(words: PreTrainedTokenizerFast, shipped: ICLConfig, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmtrain.generation.load import load

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=128, **shape)).eval()
    llama.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model, its_words = load(tmp_path, recipe=None, device="cpu", dtype="float32")
    pair = Pair(ids(40, 50, 60), ids(70, 80))
    with torch.no_grad():
        logs = llama(torch.tensor([[40, 50, 60, 70, 80]])).logits[0].log_softmax(-1)
    (found,) = score_pairs(model, [pair], batch_size=1, ranks=ALONE, sharded=False)
    assert found.loss == pytest.approx(-float(logs[2, 70] + logs[3, 80]) / 2, rel=1e-5)
    some = shipped.model_copy(update={"icl_tasks": shipped.icl_tasks[2:], "eval_gauntlet": None})
    whole = run(model, its_words, some)
    assert run(model, its_words, some.model_copy(update={"device_eval_batch_size": 3})) == whole
