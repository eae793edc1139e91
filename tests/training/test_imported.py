"""Training starts from an imported checkpoint: sharded or full, under load_path or model.pretrained, on any ranks."""

from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.checkpoint.import_command import import_weights
from llmtrain.model.config import MPTConfig
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch
from llmtrain.testing.random_weights import RandomWeights
from llmtrain.testing.recipe import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.long]
EVAL = "metrics/eval/LanguageCrossEntropy"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus: TinyCorpus) -> Path:
    """A recipe, a Hugging Face folder of its shape, and that folder imported twice."""
    folder = tmp_path_factory.mktemp("imported")
    tiny_recipe(folder / "base.yaml", corpus, max_duration="1ba", save_interval="100ba", eval_subset_num_batches=-1)
    block = {"d_model": 48, "n_heads": 3, "n_layers": 2, "vocab_size": corpus.vocab_size, "max_seq_len": 64}
    config = MPTConfig.model_validate({**block, "no_bias": True, "attn_config": {"alibi": True}})
    (folder / "hf").mkdir()
    # Of a size that makes its loss its own.
    weights = RandomWeights(config, torch.float32, std=0.3)
    write_hf_folder(folder / "hf", config, weights, dtype="float32", tokenizer=corpus.tokenizer)
    for to in ("sharded", "full"):
        import_weights(folder / "hf", folder / to, to=to)
    return folder


def loss_before_training(place: Path, name: str, ranks: int, *overrides: str) -> float:
    run = launch(place / "base.yaml", [f"run_name={name}", "eval_first=true", *overrides], ranks=ranks, cwd=place)
    assert run.code == 0, run.output
    return float(run.metrics(EVAL)[0])


def test_the_same_loss_from_every_form(place: Path) -> None:
    wanted = loss_before_training(place, "hf", 1, f"model.pretrained={place / 'hf'}")
    untrained = loss_before_training(place, "random", 1)
    assert wanted > untrained + 0.5
    starts = {
        "sharded": (2, f"load_path={place / 'sharded'}", "load_weights_only=true"),
        "full-into-shards": (2, f"load_path={place / 'full'}", "load_weights_only=true"),
        "full": (1, f"load_path={place / 'full'}", "load_weights_only=true", "fsdp_config=null"),
        "pretrained": (2, f"model.pretrained={place / 'sharded'}"),
    }
    for name, (ranks, *overrides) in starts.items():
        assert loss_before_training(place, name, ranks, *overrides) == pytest.approx(wanted, abs=1e-5), name
