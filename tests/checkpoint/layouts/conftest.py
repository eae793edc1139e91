"""Models of every kind, and the folders that they are written to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.checkpoint.layouts import Layout, choose_layout
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT

SHAPE: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 80, "vocab_size": 300}


def config_of(**options: Any) -> MPTConfig:
    # Ten times the usual standard deviation: logits of size 5, so that a wrong function shows.
    return MPTConfig.model_validate({**SHAPE, "init_config": {"name": "baseline_", "init_std": 0.2}, **options})


def weights_of(config: MPTConfig) -> dict[str, Tensor]:
    """Random, biases and norms included."""
    torch.manual_seed(0)
    weights = MPT(config).state_dict()
    special = ("bias", "norm", "_ln")
    return {n: v + 0.2 * torch.randn_like(v) if any(s in n for s in special) else v for n, v in weights.items()}


@pytest.fixture(autouse=True)
def _modules_of_transformers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers copies a folder's code into a cache of its own: not into the user's."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


Written = tuple[Path, Layout, MPTConfig, dict[str, Tensor]]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Writes a model with those options of MPTConfig."""

    def write(folder: Path | None = None, tokenizer: Path | None = None, **options: Any) -> Written:
        config = config_of(**options)
        weights = weights_of(config)
        layout = choose_layout(config, with_code=True, where="test")
        folder = folder or tmp_path / "export"
        folder.mkdir(parents=True)
        write_hf_folder(folder, config, weights, dtype="float32", tokenizer=tokenizer, layout=layout)
        return folder, layout, config, weights

    return write
