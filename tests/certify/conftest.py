"""Certificates of small recipes in the folder of a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.certify.certificate import Certificate
from llmtrain.certify.command import certify_command
from llmtrain.testing.corpus import TinyCorpus

SMALL = [
    "max_seq_len=64",
    "model.d_model=48",
    "model.n_heads=3",
    "model.n_layers=2",
    "global_train_batch_size=8",
    "device_train_microbatch_size=2",
    "device_eval_batch_size=4",
]
"""A twin in seconds."""

Certify = Callable[..., Certificate]


@pytest.fixture
def certify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Certify:
    """`llmtrain certify` in a folder of its own; the certificate goes there."""
    monkeypatch.chdir(tmp_path)

    def run(recipe: Path, *overrides: str, **options: Any) -> Certificate:
        return certify_command(recipe, overrides, output=tmp_path / "certificate", **options)

    return run


@pytest.fixture
def base_twin(repository: Path, corpus: TinyCorpus) -> tuple[Any, ...]:
    """yamls/mpt-tiny.yaml on a small corpus, with dropout, so that the random state matters."""
    data = f"variables.data={corpus.train.parent}"
    return (repository / "yamls/mpt-tiny.yaml", *SMALL, data, "model.resid_pdrop=0.1")
