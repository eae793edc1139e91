"""The loader's benchmark runs, without the peer, on a few rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark" / "loader.py"


@pytest.mark.slow
@pytest.mark.long
def test_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "loader"
    few = ["--rows", "64", "--rounds", "2", "--workers", "0", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *few], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["tokens"] == 64 * 2048
    assert [len(result["workers"][workers]["llmtrain"]) for workers in ("0", "1")] == [2, 2]
    assert all(one["cpu"] > 0 for runs in result["workers"].values() for one in runs["llmtrain"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "Million tokens/s" in done.stdout
