"""The same numbers on any number of ranks, for any batch, sharded or not; and weights read one tensor at a time."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from llmtrain.checkpoint.source import Source, open_source
from llmtrain.evaluation import ranks as processes
from llmtrain.evaluation.command import eval_command
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.sharded import load_model
from llmtrain.evaluation.source import find
from llmtrain.model.mpt import MPT
from llmtrain.recipe.load import load_recipe
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.ranks import run_ranks
from llmtrain.testing.recipe import tiny_recipe

TEXTS = ("the with statement", "import os\n", "naïve 🙂 " * 30, "def f(x): return x\n" * 9, "0")


@pytest.fixture(scope="module")
def run(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights: an untied head, whose rows do not divide evenly, and grouped queries."""
    folder = tmp_path_factory.mktemp("run")
    model = {
        **{"name": "mpt_causal_lm", "d_model": 48, "n_heads": 3, "n_layers": 2, "no_bias": True},
        "tie_word_embeddings": False,
        "vocab_size": 515,
        "attn_config": {"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 1},
    }
    recipe = tiny_recipe(folder / "x.yaml", corpus, model=model)
    torch.manual_seed(0)
    state = {f"model.{name}": value for name, value in MPT(load_recipe(recipe).model).state_dict().items()}
    checkpoints = folder / "runs" / "x" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints.parent / "recipe.yaml").write_text(recipe.read_text())
    torch.save({"state": {"model": state}}, checkpoints / "ep0-ba5.pt")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return checkpoints / "ep0-ba5.pt"


def evaluated(run: Path, data: list[Path], batch_tokens: int, shard: bool) -> dict:
    output = run.parent / f"results-{shard}-{batch_tokens}"
    settings = {"batch_tokens": batch_tokens, "max_tokens": 1500, "lengths": [64, 48], "output": output}
    return eval_command(run, data=data, shard=shard, console=Console(file=io.StringIO()), **settings)


def on_ranks(run: Path, data: list[Path]) -> dict:
    found = {(shard, n): evaluated(run, data, n, shard) for shard, n in ((False, 200), (True, 500))}
    ranks = processes.start()
    model, _ = load_model(find(run), ranks, shard=True)
    weights = dict(model.named_parameters())
    assert all(isinstance(weight, DTensor) for weight in weights.values())
    return {
        "found": found,
        "held": sum(weight.to_local().numel() for weight in weights.values()),
        "weights": {name: weight.full_tensor() for name, weight in weights.items()},
        "order": ranks.gather([f"item {number}" for number in ranks.deal(5)]),
        "rounds": ranks.rounds(len(ranks.deal(5))),
        "sum": ranks.sum(torch.tensor([1.0, ranks.rank], dtype=torch.float64)).tolist(),
    }


def test_ranks_batches_and_sharding_do_not_change_the_numbers(run: Path, corpus: TinyCorpus) -> None:
    """More ranks than one, and a document for each of them and one more: some ranks have less to do than others."""
    texts = sorted((run.parents[3]).glob("*.txt"))
    alone = evaluated(run, [corpus.val, *texts], 16_384, False)
    again = evaluated(run, [corpus.val, *texts], 1, False)
    first, second = run_ranks(on_ranks, 2, run, [corpus.val, *texts])
    several = [again, *first["found"].values(), *second["found"].values()]
    assert [found["ranks"] for found in several] == [1, 2, 2, 2, 2]
    assert [found["sharded"] for found in several] == [False, False, True, False, True]
    for found in several:
        for at, expected in zip(found["lengths"], alone["lengths"], strict=True):
            assert at["targets"] == expected["targets"]
            assert at["bytes"] == expected["bytes"]
            assert at["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert at["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
            assert [b["targets"] for b in at["by_position"]] == [b["targets"] for b in expected["by_position"]]
            assert at["by_source"].keys() == expected["by_source"].keys()
            for name, source in at["by_source"].items():
                assert source["loss"] == pytest.approx(expected["by_source"][name]["loss"], rel=1e-6)
                assert source["targets"] == expected["by_source"][name]["targets"]
    saved = torch.load(run, weights_only=True)["state"]["model"]
    for one in (first, second):
        assert one["held"] < sum(value.numel() for value in saved.values()) * 0.6
        assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in one["weights"].items())
        assert one["order"] == [f"item {number}" for number in range(5)]
        assert one["rounds"] == 3
        assert one["sum"] == [2.0, 1.0]


def test_one_process_alone() -> None:
    ranks = Ranks()
    assert list(ranks.deal(3)) == [0, 1, 2]
    assert ranks.gather(["a", "b"]) == ["a", "b"]
    assert ranks.rounds(4) == 4
    assert ranks.sum(torch.tensor([1.0])).tolist() == [1.0]


def test_each_tensor_is_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of any size is read tensor by tensor: never is more than one whole tensor held beside the model."""
    read: list[str] = []

    def watched(path: Path, recipe: Path | None = None) -> Source:
        found = open_source(path, recipe)
        kind = type(found.weights)
        own = kind.__getitem__
        monkeypatch.setattr(kind, "__getitem__", lambda self, name: read.append(name) or own(self, name))
        return found

    monkeypatch.setattr("llmtrain.evaluation.sharded.open_source", watched)
    model, _ = load_model(find(run), Ranks())
    assert sorted(read) == sorted(name for name, _ in model.named_parameters())
