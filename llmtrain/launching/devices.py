"""How many GPUs this machine has, without importing torch where that can be avoided."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

_PATIENCE = 60


def count_gpus() -> int:
    """GPUs that a rank on this machine would see; CUDA_VISIBLE_DEVICES counts."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
        return len(named)
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists() and not shutil.which("nvidia-smi"):
        return 0
    if (program := shutil.which("nvidia-smi")) is not None:
        listed = _lines([program, "-L"])
        if gpus := [line for line in listed if line.startswith("GPU ")]:
            return len(gpus)
    counted = _lines([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"])
    return int(counted[-1]) if counted and counted[-1].isdigit() else 0


def _lines(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []
