"""The process that exports beside a training."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.export_process import Request
from llmtrain.checkpoint.export_process import run as run_request
from llmtrain.training.last_export import exported


def test_the_record_names_run_and_checkpoint_and_no_place_on_this_machine(run, tmp_path: Path) -> None:
    path, _ = run.save()
    target = tmp_path / "huggingface" / "anything"
    asked = Request(
        source=str(path),
        target=str(target),
        dtype="bfloat16",
        overwrite=True,
        with_code=False,
        answer="",
        push=[str(tmp_path / "pushed")],
        threads=torch.get_num_threads(),
        run="mine",
    )
    assert run_request(asked).problem is None
    for place in (target, tmp_path / "pushed"):
        text = (place / "llmtrain_export.json").read_text()
        assert json.loads(text)["source"] == f"mine/{path.name}"
        assert str(tmp_path) not in text
    assert run_request(replace(asked, overwrite=False)).done_before
    # By its record it is found under any name.
    step = int(path.name.rpartition("-ba")[2])
    assert exported(target.parent, "mine", step)
    assert not exported(target.parent, "mine", step + 1)
    assert not exported(target.parent, "other", step)


def test_a_training_that_ended_before_the_process_could_watch_it(tmp_path: Path) -> None:
    asked = Request(str(tmp_path), str(tmp_path / "out"), "float32", True, False, str(tmp_path / "answer.json"))
    asked = replace(asked, parent=os.getppid())  # not who starts it
    asked.write(tmp_path / "request.json")
    command = [sys.executable, "-m", "llmtrain.checkpoint.export_process", str(tmp_path / "request.json")]
    assert subprocess.run(command, check=False).returncode == 2
    assert not (tmp_path / "answer.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's out-of-memory killer")
def test_the_kernel_ends_it_before_the_training(tmp_path: Path) -> None:
    asked = Request(str(tmp_path), str(tmp_path / "out"), "float32", True, False, str(tmp_path / "answer.json"))
    asked.write(tmp_path / "request.json")
    code = (
        "import sys; from pathlib import Path; from llmtrain.checkpoint import export_process as it\n"
        "it.run = lambda request: it.Answer(Path('/proc/self/oom_score_adj').read_text().strip())\n"
        "it.main(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "request.json")], check=True)
    assert json.loads((tmp_path / "answer.json").read_text())["problem"] == "1000"
