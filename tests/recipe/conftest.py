from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

RECIPE: dict[str, Any] = {
    "max_seq_len": 128,
    "model": {"name": "mpt_causal_lm", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512},
    "tokenizer": {"name": "data/tokenizer"},
    "train_loader": {"name": "text", "dataset": {"local": "data", "split": "train"}},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "scheduler": {"name": "cosine_with_warmup", "t_warmup": "10ba"},
    "max_duration": "100ba",
    "global_train_batch_size": 16,
    "device_train_microbatch_size": 4,
}


class Write(Protocol):
    """Writes the smallest recipe with some top-level keys changed; None removes one."""

    def __call__(self, **changes: Any) -> Path: ...


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.delenv("RUN_NAME", raising=False)

    def to_file(**changes: Any) -> Path:
        path = tmp_path / "small.yaml"
        recipe = {key: value for key, value in {**RECIPE, **changes}.items() if value is not None}
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return to_file
