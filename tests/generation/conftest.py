"""A tiny model as an export (with its tokenizer): what generation starts from."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT


def tiny(**changes: Any) -> MPT:
    """A random model whose logits have size 1 and more, so that greedy choices are clear."""
    block = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "vocab_size": 384,
        "no_bias": True,
        "attn_config": {"alibi": True},
        "init_config": {"name": "baseline_", "init_std": 0.3},
        **changes,
    }
    torch.manual_seed(1)
    return MPT(MPTConfig.model_validate(block)).eval()


@pytest.fixture
def model() -> MPT:
    """ALiBi, 64 tokens of training length."""
    return tiny()


@pytest.fixture
def make_model() -> Any:
    """`make_model(**changes)`: the tiny model with other settings."""
    return tiny


@pytest.fixture
def exported(tmp_path: Path, tokenizer: Path, model: MPT) -> Path:
    """The tiny model as a Hugging Face folder."""
    folder = tmp_path / "hf"
    folder.mkdir()
    write_hf_folder(folder, model.config, model.state_dict(), dtype="float32", tokenizer=tokenizer)
    return folder
