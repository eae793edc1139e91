"""A model of one gigabyte is converted in a fraction of it, the proof included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark" / "convert.py"
SHARD = 200_000_000
SLOW = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("sharded", "full"),
        *(
            pytest.param(source, target, marks=SLOW)
            for source, target in (
                ("sharded", "safetensors"),
                ("full", "bin"),
                ("bin", "sharded"),
                ("bin", "safetensors"),
                ("safetensors", "safetensors"),
            )
        ),
    ],
)
def test_a_gigabyte_needs_less_than_two_shards_and_a_tensor(tmp_path: Path, source: str, target: str) -> None:
    command = [sys.executable, str(SCRIPT), "--source", source, "--target", target, "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--shard", str(SHARD), "--threads", "1"], capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] > 1e9
    assert found["files"] > 4 or target == "full"
    assert found["peak"] < 2 * SHARD + found["largest_tensor"], found
    assert not list(tmp_path.iterdir())
