"""What is started again and what is not, signals, and what is said: with a small program in the launcher's place."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmtrain.launching import attempt

FAKE = Path(__file__).parent / "fake_launcher.py"

SUPERVISE = """
import signal, sys
from pathlib import Path
for one in (signal.SIGHUP, signal.SIGINT):  # whoever runs the tests may ignore them
    signal.signal(one, signal.SIG_IGN if one in {ignored!r} else signal.SIG_DFL)
{prelude}
from llmtrain.launching.supervisor import Job, inherited, supervise
run = Path("runs/fake")
job = Job(
    command=lambda: [sys.executable, {fake!r}, "script.json"],
    environment=inherited({{}}),
    run=run,
    save_folder=run / "checkpoints",
    backoff=(0.1, 0.2),
    **{options!r},
)
sys.exit(supervise(job))
"""

Supervised = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Supervised]:
    """Supervises ranks that do what a script says (see fake_launcher.py), in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def begin(
        *script: list[dict[str, Any]], ignored: tuple[int, ...] = (), prelude: str = "", **options: Any
    ) -> Supervised:
        (tmp_path / "script.json").write_text(json.dumps(script))
        code = SUPERVISE.format(fake=str(FAKE), options=options, ignored=ignored, prelude=prelude)
        return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    return begin


def ended(process: Supervised, timeout: float = 30) -> tuple[int, str]:
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


def ranks_are_up(folder: Path, n: int = 2) -> list[int]:
    """Their process ids, once they have written them."""
    files = [folder / f"runs/fake/pid-{rank}" for rank in range(n)]
    deadline = time.monotonic() + 20
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # until the supervisor has looked for them
    return [int(file.read_text()) for file in files]


def gone(pids: list[int], timeout: float = 10) -> bool:
    deadline = time.monotonic() + timeout
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


RUNS: dict[str, Any] = {}
FINE = {"exit": 0}


def test_a_killed_rank_is_named_and_started_again(start: Callable[..., Supervised], tmp_path: Path) -> None:
    killed = {"after": 0.6, "kill": 9, "step": 57, "checkpoint": 50}
    code, errors = ended(start([RUNS, killed], [FINE, FINE]))
    assert code == 0, errors
    assert starts(tmp_path) == 2
    assert "launch      rank 1 was killed by SIGKILL after step 57: out of memory?" in errors
    assert "launch      restart 1 of 3 in 0.1 s, from step 50" in errors
    assert errors.count("was killed") == 1


def test_a_slow_peer_does_not_delay_the_message(start: Callable[..., Supervised], tmp_path: Path) -> None:
    """A rank that is killed is named before its peers have ended."""
    process = start([{"saving": 0.9, "on_term": 1}, {"after": 0.6, "kill": 9}], [FINE])
    assert process.stderr is not None
    lines = []
    while not any("was killed" in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    assert not any("saved" in line for line in lines)
    assert ended(process)[0] == 0


@pytest.mark.parametrize("code", [2, 3])
def test_what_would_come_again_is_not_started_again(
    code: int, start: Callable[..., Supervised], tmp_path: Path
) -> None:
    got, errors = ended(start([{"exit": 0}, {"exit": code}]))
    assert got == code
    assert starts(tmp_path) == 1
    assert "Not started again" in errors


def test_the_code_of_the_rank_that_went_first_counts(start: Callable[..., Supervised], tmp_path: Path) -> None:
    """Composer's launcher gives that of the lowest rank that failed: here of one that was asked to end by it."""
    code, _ = ended(start([{"on_term": 1}, {"after": 0.5, "exit": 3}]))
    assert (code, starts(tmp_path)) == (3, 1)


def test_preempted_by_others_ends_unless_asked(start: Callable[..., Supervised], tmp_path: Path) -> None:
    code, errors = ended(start([{"exit": 143}]))
    assert (code, starts(tmp_path)) == (143, 1)
    assert "The same command continues" in errors


def test_preempted_by_others_is_started_again_where_asked(start: Callable[..., Supervised], tmp_path: Path) -> None:
    code, _ = ended(start([{"exit": 143}], [FINE], restart_preempted=True))
    assert (code, starts(tmp_path)) == (0, 2)


def test_a_crash_loop_ends_early(start: Callable[..., Supervised], tmp_path: Path) -> None:
    crash = {"exit": 1, "step": 57}
    code, errors = ended(start([crash], max_restarts=10))
    assert (code, starts(tmp_path)) == (1, 3)
    assert "crash loop: 2 restarts brought it no further than step 57" in errors


def test_progress_resets_the_crash_loop_and_restarts_end_all_the_same(
    start: Callable[..., Supervised], tmp_path: Path
) -> None:
    script = [[{"exit": 75, "step": step}] for step in (10, 10, 20, 20, 30, 30)]
    code, errors = ended(start(*script, max_restarts=4))
    assert (code, starts(tmp_path)) == (75, 5)
    assert "given up after 4 restarts" in errors
    assert "rank 0 ended with exit code 75 after step 20: a hang, or no contact to another rank" in errors


def test_a_new_checkpoint_is_progress(start: Callable[..., Supervised], tmp_path: Path) -> None:
    script = [[{"exit": 1, "checkpoint": step}] for step in (10, 20, 30, 40)]
    code, _ = ended(start(*script, [FINE], max_restarts=9))
    assert (code, starts(tmp_path)) == (0, 5)


def test_a_port_that_was_taken_is_not_a_crash(start: Callable[..., Supervised], tmp_path: Path) -> None:
    taken = {"exit": 1, "say": "RuntimeError: The server socket has failed to listen ... EADDRINUSE"}
    code, errors = ended(start([taken], [taken], [FINE], max_restarts=0))
    assert (code, starts(tmp_path)) == (0, 3)
    assert "the port was taken" in errors


def test_a_port_that_is_always_the_same_is_not_exchanged(start: Callable[..., Supervised], tmp_path: Path) -> None:
    """That of --rdzv-endpoint: all hosts know it."""
    said = "The server socket has failed to listen on any local network address. port: 29511, name: EADDRINUSE"
    code, errors = ended(start([{"exit": 1, "say": said}], max_restarts=1, port=29511))
    assert (code, starts(tmp_path)) == (1, 2)
    assert "port 29511 is taken: by another launch" in errors
    assert "another one" not in errors


def test_a_port_of_the_ranks_own_says_nothing_about_the_endpoint(start: Callable[..., Supervised]) -> None:
    said = "The server socket has failed to listen on any local network address. port: 41234, name: EADDRINUSE"
    _, errors = ended(start([{"exit": 1, "say": said}], max_restarts=0, port=29511))
    assert "29511" not in errors


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_what_is_to_be_ignored_is_ignored(
    signum: signal.Signals, start: Callable[..., Supervised], tmp_path: Path
) -> None:
    """`nohup llmtrain launch ...`, and the terminal is closed; or `&` in a script, and Ctrl-C is for the script."""
    process = start([RUNS], ignored=(int(signum),))
    ranks_are_up(tmp_path, 1)
    process.send_signal(signum)
    time.sleep(0.7)
    assert process.poll() is None
    process.terminate()
    code, errors = ended(process)
    assert code == 143
    assert "SIGTERM: ended." in errors
    assert signum.name not in errors


@pytest.mark.long
def test_who_waits_in_the_kernel_is_named_and_not_waited_for(start: Callable[..., Supervised], tmp_path: Path) -> None:
    """A disk that does not answer: not even SIGKILL ends such a process. Here none arrives."""
    deaf = "from llmtrain.launching import family; family.UNKILLABLE = 0.5; family._signal_all = lambda *_: True"
    process = start([{"exit": 1, "after": 0.6}, {"saving": 30}], prelude=deaf, grace=1.0)
    pids = ranks_are_up(tmp_path)
    os.kill(psutil.Process(pids[1]).ppid(), signal.SIGKILL)  # so that nobody else ends the second
    code, errors = ended(process, timeout=25)
    os.kill(pids[1], signal.SIGKILL)
    assert code != 0
    assert starts(tmp_path) == 1
    assert f"{pids[1]} does not end, not even by SIGKILL" in errors


def test_nothing_is_lost_of_what_ranks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(attempt.os, "write", lambda _, data: written.append(data[:3]) or len(data[:3]))
    attempt._write(b"0123456789")
    assert b"".join(written) == b"0123456789"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_ranks_and_they_have_time(
    signum: signal.Signals, start: Callable[..., Supervised], tmp_path: Path
) -> None:
    """The launcher would kill them after a second (the real one after half a minute)."""
    process = start([{"saving": 2}, {"saving": 2}])
    pids = ranks_are_up(tmp_path)
    process.send_signal(signum)
    code, errors = ended(process)
    assert code == 143, errors
    assert errors.count("saved") == 2
    assert f"{signum.name}: ended. The same command continues." in errors
    assert starts(tmp_path) == 1
    assert gone(pids)


def test_a_third_request_ends_at_once(start: Callable[..., Supervised], tmp_path: Path) -> None:
    process = start([{"saving": 30}, {"saving": 30}])
    pids = ranks_are_up(tmp_path)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    code, errors = ended(process, timeout=20)
    assert code == 137, errors
    assert gone(pids)


def test_who_does_not_end_in_time_is_killed(start: Callable[..., Supervised], tmp_path: Path) -> None:
    process = start([{"saving": 30}], grace=1.0)
    pids = ranks_are_up(tmp_path, 1)
    process.terminate()
    code, errors = ended(process, timeout=20)
    assert code == 137
    assert "SIGTERM: killed, since it did not end in time" in errors
    assert gone(pids)


def test_a_request_between_two_attempts_ends_it(start: Callable[..., Supervised], tmp_path: Path) -> None:
    process = start([{"exit": 1}])
    assert process.stderr is not None
    while "restart 1" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    code, _ = ended(process)
    assert code == 143
    assert starts(tmp_path) <= 2


def test_a_killed_launcher_leaves_no_rank(start: Callable[..., Supervised], tmp_path: Path) -> None:
    process = start([RUNS, {"saving": 60}], [FINE, FINE])
    pids = ranks_are_up(tmp_path)
    os.kill(psutil.Process(pids[0]).ppid(), signal.SIGKILL)
    code, errors = ended(process)
    assert (code, starts(tmp_path)) == (0, 2), errors
    assert "the launcher was killed by SIGKILL" in errors
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(PR_SET_PDEATHSIG) is Linux's")
def test_nothing_is_left_of_a_killed_supervisor(start: Callable[..., Supervised], tmp_path: Path) -> None:
    process = start([{"saving": 0.2}, {"saving": 0.2}])
    pids = ranks_are_up(tmp_path)
    launcher = psutil.Process(pids[0]).ppid()
    process.kill()
    assert gone([launcher, *pids])
    process.communicate()
