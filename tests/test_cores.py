"""Threads of a rank."""

import pytest

from llmtrain import cores


@pytest.mark.parametrize(
    ("said", "threads"),
    [
        ({}, "share"),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, "share"),  # torchrun's own, and nobody's wish
    ],
)
def test_a_rank_takes_its_share_of_the_cores_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], threads: str | None
) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cores, "available_cores", lambda: 8)
    assert cores.threads_of_a_rank(2) == (4 if threads else None)
