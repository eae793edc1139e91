"""Faults of processes in real runs of two ranks: killed, stopped, slow, without memory, without a launcher."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint import manifest
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.faults import Stopwatch, observe
from llmtrain.testing.launch import Run, launch, launcher_command, launcher_environment, read_metric
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training.exit_codes import FAILED, LOST_CONTACT, PREEMPTED

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS = "loss/train/total"
PATIENCE = 300.0


def make(folder: Path, corpus: TinyCorpus, **changes: Any) -> Path:
    """A recipe that is long enough to be disturbed."""
    settings: dict[str, Any] = {"max_duration": "2000ba", "save_interval": "5ba", "eval_loader": None, **changes}
    return tiny_recipe(folder / "r.yaml", corpus, **settings)


def with_code(folder: Path, corpus: TinyCorpus, code: str, **changes: Any) -> Path:
    """The same, with code that each rank runs before anything else."""
    (folder / "fault.py").write_text(code)
    return make(folder, corpus, code_paths=[str(folder / "fault.py")], **changes)


def wait_until(happened: Callable[[], bool], seconds: float = PATIENCE, what: Callable[[], str] = str) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, what()
        time.sleep(0.02)


def line_with(output: str, text: str) -> str:
    """The line of the output that has `text`; exactly one has."""
    lines = [line for line in output.splitlines() if text in line]
    assert len(lines) == 1, output
    return lines[0]


def steps(run: Run) -> int:
    return max(read_metric(run.folder, LOSS), default=0)


def latest_is_intact(folder: Path) -> int:
    """The step of `latest`, which must be whole."""
    latest = folder / "checkpoints/latest"
    assert manifest.verify(latest) == []
    return manifest.read(latest).step


def test_a_rank_is_killed(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = make(tmp_path, corpus)
    run = Run(recipe, ranks=2, cwd=tmp_path)
    run.wait_for("ep0-ba5  ")
    watch = Stopwatch()
    run.send(signal.SIGKILL, [1])
    run.wait_for("error (")
    detected = watch.seconds()
    finished = run.wait()
    assert finished.codes == (LOST_CONTACT, -signal.SIGKILL), finished.output
    message = line_with(finished.output, "error (")
    assert re.match(r"error \(rank 1, after step \d+\): rank 1 .* its process is gone", message), message
    assert "Traceback" not in finished.output
    step = latest_is_intact(run.folder)
    again = Run(recipe, ["max_duration=" + str(step + 2) + "ba"], ranks=2, cwd=tmp_path)
    again.wait_for(f"train       step {step + 1} ")
    recovered = watch.seconds()
    assert again.wait().code == 0
    outcome = "the other ranks end with exit code 75; the same command continues from the newest checkpoint"
    observe("rank killed (SIGKILL)", outcome, run=run.folder, detected=detected, recovered=recovered, message=message)


def test_a_rank_is_stopped_for_good(corpus: TinyCorpus, tmp_path: Path) -> None:
    run = Run(make(tmp_path, corpus, watchdog={"heart_limit": 6}), ranks=2, cwd=tmp_path)
    run.wait_for("ep0-ba5  ")
    check_stopped(run, "rank stopped for good (SIGSTOP), heart_limit 6")


@pytest.mark.long  # the limits that a recipe has without saying so
def test_a_rank_is_stopped_for_good_with_default_limits(corpus: TinyCorpus, tmp_path: Path) -> None:
    run = Run(make(tmp_path, corpus), ranks=2, cwd=tmp_path)
    run.wait_for("ep0-ba5  ")
    check_stopped(run, "rank stopped for good (SIGSTOP)")


def check_stopped(run: Run, fault: str) -> None:
    watch = Stopwatch()
    run.send(signal.SIGSTOP, [1])
    run.wait_for("error (")
    detected = watch.seconds()
    wait_until(lambda: not run.processes[0].is_alive(), 30, run.output)
    run.send(signal.SIGKILL, [1])  # as its launcher would
    finished = run.wait()
    assert finished.codes == (LOST_CONTACT, -signal.SIGKILL), finished.output
    message = line_with(finished.output, "error (")
    assert re.match(r"error \(rank 1, after step \d+\): the run waits for it: its heart stopped", message), message
    assert "Thread" in (run.folder / "hang/rank-0.txt").read_text()
    latest_is_intact(run.folder)
    outcome = "named, with stacks in RUN/hang; exit code 75"
    observe(fault, outcome, run=run.folder, detected=detected, recovered=None, message=message)


@pytest.mark.long
def test_a_rank_is_stopped_and_goes_on(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = make(tmp_path, corpus, max_duration="30ba", watchdog={"step_limit": 12, "heart_limit": 12})
    run = Run(recipe, ranks=2, cwd=tmp_path)
    run.wait_for("ep0-ba5  ")
    watch = Stopwatch()
    run.send(signal.SIGSTOP, [1])
    time.sleep(7)
    before = steps(run)
    run.send(signal.SIGCONT, [1])
    wait_until(lambda: steps(run) > before + 1, what=run.output)
    recovered = watch.seconds()
    finished = run.wait()
    assert finished.codes == (0, 0), finished.output
    assert "error" not in finished.output
    assert not (run.folder / "heartbeats").exists()
    observe(
        "rank stopped for 7 s (SIGSTOP, SIGCONT)",
        "the run waits and goes on",
        run=run.folder,
        detected=recovered,
        recovered=recovered,
        message="(nothing is said)",
    )


OUT_OF_MEMORY = """
import os, resource, torch
from llmtrain.model.block import Block
forward, calls = Block.forward, [0]

def limited(self, *args, **kwargs):
    calls[0] += 1
    if os.environ["RANK"] == "1" and calls[0] == 50:
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20),) * 2)
        torch.zeros(1 << 30)
    return forward(self, *args, **kwargs)

Block.forward = limited
"""


def test_a_rank_runs_out_of_memory(corpus: TinyCorpus, tmp_path: Path) -> None:
    run = Run(with_code(tmp_path, corpus, OUT_OF_MEMORY), ranks=2, cwd=tmp_path)
    run.wait_for("train       step 10 ")
    watch = Stopwatch()
    run.wait_for("error (")
    detected = watch.seconds()
    finished = run.wait()
    assert finished.codes == (LOST_CONTACT, FAILED), finished.output
    message = line_with(finished.output, "error (")
    assert re.match(r"error \(rank 1, after step 12\): .*can't allocate memory", message), message
    assert "device_train_microbatch_size" in message
    assert line_with(finished.output, "ended       ").startswith("ended       after step 12, because rank 1 failed")
    assert "Traceback (" not in finished.output
    assert "torch.zeros(1 << 30)" in (run.folder / "failures/rank-1.txt").read_text()
    assert json.loads((run.folder / "failures/rank-1.json").read_text())["step"] == 12
    assert latest_is_intact(run.folder) == 10
    outcome = "one message with what to lower; traceback in RUN/failures; exit code 1, of the others 75"
    fault = "out of memory in one rank (RLIMIT_AS)"
    observe(fault, outcome, run=run.folder, detected=detected, recovered=None, message=message)


@pytest.mark.long  # an exception in one rank, as out of memory is
def test_a_worker_of_a_data_loader_is_killed(corpus: TinyCorpus, tmp_path: Path) -> None:
    loader = {
        "name": "text",
        "dataset": {"local": str(corpus.train), "shuffle": True, "num_canonical_nodes": 4},
        "num_workers": 2,
    }
    run = Run(make(tmp_path, corpus, train_loader=loader), ranks=2, cwd=tmp_path)
    run.wait_for("ep0-ba5  ")
    children = Path(f"/proc/{run.processes[1].pid}/task/{run.processes[1].pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    watch = Stopwatch()
    os.kill(workers[0], signal.SIGKILL)
    run.wait_for("error (")
    detected = watch.seconds()
    finished = run.wait()
    assert finished.codes == (LOST_CONTACT, FAILED), finished.output
    message = line_with(finished.output, "error (")
    assert re.match(r"error \(rank 1, after step \d+\): DataLoader worker .* killed", message), message
    assert "num_workers" in message
    latest_is_intact(run.folder)
    outcome = "one message; exit code 1, of the others 75; the same command continues"
    fault = "data-loader worker killed (SIGKILL)"
    observe(fault, outcome, run=run.folder, detected=detected, recovered=None, message=message)


SLOW = """
import os, time
from llmtrain.model.block import Block
forward = Block.forward

def slow(self, *args, **kwargs):
    if os.environ["RANK"] == "1":
        time.sleep(0.05)
    return forward(self, *args, **kwargs)

Block.forward = slow
"""


@pytest.mark.long
def test_a_slow_rank_is_named(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = with_code(tmp_path, corpus, SLOW, max_duration="12ba", watchdog={"report_interval": 5})
    run = Run(recipe, ranks=2, cwd=tmp_path)
    run.wait_for("train       step 1 ")
    watch = Stopwatch()
    run.wait_for("slow        ")
    detected = watch.seconds()
    finished = run.wait()
    assert finished.codes == (0, 0), finished.output
    message = line_with(finished.output, "slow        ")
    assert re.match(r"slow        rank 1 \(\S+\) computes [\d.]+x longer than the median rank \(p50 [\d,]+ ms", message)
    assert set(finished.metrics("time/step_p50")) == {5, 10}
    assert finished.metrics("time/step_p99")[10] >= finished.metrics("time/step_p50")[10] > 0.05
    assert 0 <= finished.metrics("time/data_wait_share")[10] < 0.5
    outcome = "named; training goes on"
    observe("slow rank", outcome, run=run.folder, detected=detected, recovered=detected, message=message)


CLOCK_JUMP = """
import datetime, os, time
from llmtrain.model.block import Block
forward, calls, shift = Block.forward, [0], [0.0]
now, wall = datetime.datetime, time.time

class Jumped(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return now.now(tz) + datetime.timedelta(seconds=shift[0])

datetime.datetime = Jumped
time.time = lambda: wall() + shift[0]

def jump(self, *args, **kwargs):
    calls[0] += 1
    if calls[0] == 50:
        shift[0] = 7200.0 if os.environ["RANK"] == "0" else -7200.0
        print(f"clock of rank {os.environ['RANK']} jumps by {shift[0]}", flush=True)
    return forward(self, *args, **kwargs)

Block.forward = jump
"""


@pytest.mark.long
def test_the_clock_jumps(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Python's clocks of wall time in both ranks: two hours on in one, two hours back in the other."""
    watchdog = {"step_limit": 60, "heart_limit": 20, "report_interval": 5}
    changes: dict[str, Any] = {"max_duration": "20ba", "watchdog": watchdog}
    run = Run(with_code(tmp_path, corpus, CLOCK_JUMP, **changes), ranks=2, cwd=tmp_path)
    run.wait_for("clock of rank 1 jumps")
    watch = Stopwatch()
    run.wait_for("train       step 14 ")
    recovered = watch.seconds()
    finished = run.wait()
    assert finished.codes == (0, 0), finished.output
    assert "error" not in finished.output
    assert latest_is_intact(run.folder) == 20
    # And nothing of what watches a run changes a number of it.
    calm = launch(make(tmp_path, corpus, **changes), ["run_name=calm", "watchdog=null"], ranks=2, cwd=tmp_path)
    assert not calm.metrics("time/step_p50")
    assert calm.metrics(LOSS) == finished.metrics(LOSS)
    observe(
        "clock jump (2 h on in one rank, 2 h back in the other)",
        "training goes on, the same numbers",
        run=run.folder,
        detected=recovered,
        recovered=recovered,
        message="(nothing is said)",
    )


def test_sigterm_with_a_grace(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = make(tmp_path, corpus)
    run = Run(recipe, ranks=2, cwd=tmp_path)
    run.wait_for("train       step 7 ")
    watch = Stopwatch()
    run.send(signal.SIGTERM)
    run.wait_for("SIGTERM: stopped")
    detected = watch.seconds()
    finished = run.wait(30)
    assert finished.codes == (PREEMPTED, PREEMPTED), finished.output
    assert watch.seconds() < 30
    message = line_with(finished.output, "SIGTERM: stopped")
    assert "error" not in finished.output
    assert f"after step {latest_is_intact(run.folder)};" in message
    outcome = "saves after the step, exit code 143; the same command continues"
    fault = "SIGTERM to all ranks, 30 s grace"
    observe(fault, outcome, run=run.folder, detected=detected, recovered=None, message=message)


@pytest.mark.long
@pytest.mark.parametrize("during", ["evaluation", "save"])
def test_sigterm_while_something_is_in_flight(during: str, corpus: TinyCorpus, tmp_path: Path) -> None:
    slow = {
        "evaluation": "import time\n"
        "from llmtrain.model.block import Block\nforward = Block.forward\n"
        "def slowly(self, *args, **kwargs):\n"
        "    if not self.training:\n"
        "        print('in evaluation', flush=True)\n"
        "        time.sleep(0.5)\n"
        "    return forward(self, *args, **kwargs)\n"
        "Block.forward = slowly\n",
        "save": "import time\n"
        "from llmtrain.checkpoint import manifest\n"
        "write = manifest.write\n"
        "def slowly(*args, **kwargs):\n"
        "    print('in a save', flush=True)\n"
        "    time.sleep(2)\n"
        "    return write(*args, **kwargs)\n"
        "manifest.write = slowly\n",
    }[during]
    data = {"name": "text", "dataset": {"local": str(corpus.val), "num_canonical_nodes": 2}, "num_workers": 0}
    recipe = with_code(
        tmp_path, corpus, slow, eval_loader=data, eval_interval="6ba", eval_subset_num_batches=60, save_interval="5ba"
    )
    run = Run(recipe, ranks=2, cwd=tmp_path)
    run.wait_for("in evaluation" if during == "evaluation" else "in a save")
    watch = Stopwatch()
    run.send(signal.SIGTERM)
    run.wait_for("SIGTERM: stopped")
    detected = watch.seconds()
    finished = run.wait(30)
    assert finished.codes == (PREEMPTED, PREEMPTED), finished.output
    assert watch.seconds() < 30
    message = line_with(finished.output, "SIGTERM: stopped")
    assert f"after step {latest_is_intact(run.folder)};" in message
    outcome = "saves, exit code 143; the same command continues"
    fault = f"SIGTERM during {during}"
    observe(fault, outcome, run=run.folder, detected=detected, recovered=None, message=message)


def launched(recipe: Path, cwd: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Under Composer's own launcher, as a user types it."""
    log = cwd / "launcher.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            launcher_command(recipe, ranks=2), cwd=cwd, env=launcher_environment(), stdout=file, stderr=file
        )
    return process, log


def pids_of(run: Path) -> list[int]:
    return [json.loads(file.read_text())["pid"] for file in sorted((run / "heartbeats").glob("rank-*"))]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.long  # ranks that import for themselves
def test_the_launcher_is_killed(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = make(tmp_path, corpus)
    launcher, log = launched(recipe, tmp_path)
    run = tmp_path / "runs/r"
    wait_until(lambda: "ep0-ba5  " in log.read_text(), 900, log.read_text)
    pids = pids_of(run)
    assert len(pids) == 2
    watch = Stopwatch()
    launcher.kill()
    launcher.wait()
    wait_until(lambda: "launcher    of rank 0 is gone" in log.read_text(), 60, log.read_text)
    detected = watch.seconds()
    wait_until(lambda: all(gone(pid) for pid in pids), 60, log.read_text)
    assert watch.seconds() < 60
    message = line_with(log.read_text(), "launcher    of rank 0 is gone")
    stopped = line_with(log.read_text(), "SIGTERM: stopped")
    assert f"after step {latest_is_intact(run)};" in stopped
    outcome = "the ranks notice that they are orphans, save, and end; the same command continues"
    observe("launcher killed (SIGKILL)", outcome, run=run, detected=detected, recovered=None, message=message)


@pytest.mark.long  # ranks that import for themselves
def test_sigterm_to_the_launcher(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = make(tmp_path, corpus)
    launcher, log = launched(recipe, tmp_path)
    run = tmp_path / "runs/r"
    wait_until(lambda: "ep0-ba5  " in log.read_text(), 900, log.read_text)
    watch = Stopwatch()
    launcher.terminate()
    assert launcher.wait(30) == PREEMPTED, log.read_text()
    detected = watch.seconds()
    message = line_with(log.read_text(), "SIGTERM: stopped")
    assert f"after step {latest_is_intact(run)};" in message
    outcome = "all ranks save after the step; exit code 143; the same command continues"
    fault = "SIGTERM to the launcher, 30 s grace"
    observe(fault, outcome, run=run, detected=detected, recovered=None, message=message)
