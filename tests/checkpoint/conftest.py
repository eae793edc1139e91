"""Checkpoints as the trainer leaves them, written by torch's own DCP and torch.save."""

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.torch_version import TorchVersion

from llmtrain.checkpoint import manifest
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.tokenizer import fingerprint

PLAIN: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 384,
    "no_bias": True,
    "attn_config": {"alibi": True},
}


def state_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The nested dict that Composer saves, with what it keeps beside the weights."""
    return {
        "state": {
            "model": {f"model.{name}": value for name, value in weights.items()},
            "optimizers": {"DecoupledAdamW": {"state": {"model.transformer.wte.weight": {"exp_avg": torch.ones(3)}}}},
            "timestamp": {"Timestamp": {"batch": 3, "total_wct": datetime.timedelta(seconds=5)}},
            "metadata": {"torch_version": TorchVersion(torch.__version__), "loss": np.float64(1.5)},
            "algorithms": [],
        },
        "rng": [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}],
    }


class Run:
    """A run folder with checkpoints of random weights."""

    PLAIN = PLAIN

    def __init__(self, folder: Path, tokenizer: Path):
        self.folder = folder
        self.tokenizer = tokenizer

    def save(
        self, step: int = 3, kind: str = "sharded", dtype: torch.dtype = torch.float32, **model: Any
    ) -> tuple[Path, dict[str, Tensor]]:
        """Add a checkpoint; returns its folder and the weights."""
        block = {**PLAIN, **model}
        torch.manual_seed(step)
        # Ten times the usual standard deviation: logits of size 1, so that a wrong function shows.
        block.setdefault("init_config", {"name": "baseline_", "init_std": 0.2})
        weights = {k: v.to(dtype) for k, v in MPT(MPTConfig.model_validate(block)).state_dict().items()}
        target = self.folder / "checkpoints" / f"ep0-ba{step}"
        target.mkdir(parents=True)
        if kind == "sharded":
            dcp.save(state_of(weights), checkpoint_id=target)
        else:
            torch.save(state_of(weights), target / "full.pt")
        self.seal(target, block, step, kind)
        return target, weights

    def seal(self, target: Path, block: dict[str, Any], step: int, kind: str) -> None:
        """(Re)write the manifest."""
        manifest.write(
            target,
            kind=kind,
            step=step,
            tokens=step * 100,
            files={f.name: manifest.file_entry(f) for f in target.iterdir() if f.name != "manifest.json"},
            recipe={"model": {"name": "mpt_causal_lm", **block}, "tokenizer": {"name": str(self.tokenizer)}},
            tokenizer_fingerprint=fingerprint(str(self.tokenizer)),
        )


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> Run:
    """An empty run with a tokenizer."""
    import shutil

    shutil.copytree(tokenizer, tmp_path / "run" / "tokenizer")
    return Run(tmp_path / "run", tokenizer)


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """Flips four bytes of a file in place."""

    def flip_bytes(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        for i in range(at, at + 4):
            data[i] ^= 0xFF
        path.write_bytes(bytes(data))

    return flip_bytes
