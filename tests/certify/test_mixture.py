"""A mixture of streams, read by workers: killed at 20 random points, then on one rank and on four."""

from pathlib import Path

import pytest

from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.recipe import tiny_recipe
from tests.certify.conftest import Certify

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]


def test_twenty_kills_and_other_ranks(certify: Certify, corpus: TinyCorpus, tmp_path: Path) -> None:
    streams = {"big": {"local": str(corpus.train), "proportion": 3}, "little": {"local": str(corpus.val), "choose": 40}}
    streams["little"] = {"local": str(corpus.val), "proportion": 1}
    dataset = {"streams": streams, "shuffle": True, "max_seq_len": 64, "num_canonical_nodes": 4}
    recipe = tiny_recipe(
        tmp_path / "mixture.yaml",
        corpus,
        model={
            "name": "mpt_causal_lm",
            "init_device": "mixed",
            "d_model": 48,
            "n_heads": 3,
            "n_layers": 2,
            "vocab_size": corpus.vocab_size,
            "attn_config": {"alibi": True},
        },
        train_loader={"name": "text", "num_workers": 2, "dataset": dataset},
    )
    made = certify(recipe, kills=20, steps=20, other_ranks="1,4", seed=2)
    assert made.granted, (made.difference, made.problem)
    assert len(made.kills) == 20
    assert set(made.by_kind()) == {"step", "save", "evaluation", "start"}
    assert made.elastic_ranks == [2, 1, 4]
    assert made.largest_loss_difference is not None
    assert 0 < made.largest_loss_difference < 1e-5
    assert made.compared["on other ranks"].startswith("20 global batches; losses and ")
