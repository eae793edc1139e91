"""The twin of MPT-7B: killed at 20 random points, and the same bits. With dropout, so that the random state matters."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.certify.conftest import Certify

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]


def test_twenty_kills_change_nothing(certify: Certify, base_twin: tuple[Any, ...], tmp_path: Path) -> None:
    made = certify(*base_twin, kills=20, steps=24, other_ranks="none", seed=1)
    assert made.granted, (made.difference, made.problem)
    assert len(made.kills) == 20
    assert set(made.by_kind()) == {"step", "save", "evaluation", "start"}
    assert any(made.resumed)
    assert made.compared["steps"].startswith("24, and ")
    assert int(made.compared["tensors of the last checkpoint"].split()[0]) >= 14 * 4 + 2
    assert int(made.compared["results of evaluations"]) >= 3 * 4
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert written["granted"] is True
    assert sum(written["kills_by_kind"].values()) == len(written["kills"]) == 20
    assert (tmp_path / "certificate.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "runs").exists()
