"""Watchdogs of real processes that stand still; no torch in them."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmtrain.training.exit_codes import LOST_CONTACT
from llmtrain.training.hang_report import Seen, hang_message, waited_for
from llmtrain.training.heartbeat import Beat, Heartbeats, machine, process_state
from llmtrain.training.stacks import main_place
from llmtrain.training.step_limits import StepLimits
from llmtrain.training.watchdog import Watchdog, following

ALL_REDUCE = "/site-packages/torch/distributed/distributed_c10d.py"


def beat(rank: int, **changes: Any) -> Beat:
    return Beat(rank, f"host-{rank}", "elsewhere", 100 + rank, **{"step": 57, "phase": "step 58", **changes})


def alive(rank: int, kind: str = "collective", place: str = "waits in all_reduce, a.py:1", **changes: Any) -> Seen:
    return Seen(beat(rank, kind=kind, place=place, since=63.0, **changes), 0.5, "alive")


def test_who_is_waited_for() -> None:
    late = alive(2, "data", "reads data, text.py:88 in batches")
    assert waited_for([alive(0), alive(1), late])[0] == [late]
    silent = Seen(beat(1), 61.0, "silent")
    assert waited_for([alive(0), silent, late])[0] == [silent]
    behind = alive(1, step=56)
    assert waited_for([alive(0), behind, alive(2)])[0] == [behind]
    assert waited_for([alive(0), alive(1)]) == (
        [],
        "all of them wait in collective calls: is the network between their hosts up?",
    )


def test_a_hang_is_told_once_with_rank_step_and_cause() -> None:
    ranks = [alive(0), alive(1, "code", "is in user code, plugins/slow.py:12 in forward")]
    text = hang_message(ranks, waited=63, limit=60, stacks="runs/x/hang/rank-*.txt", advice="Again.")
    first, *rest = text.splitlines()
    assert first.startswith("error (rank 1, after step 57): the run waits for it")
    assert "plugins/slow.py:12" in first
    assert "the limit is 60 s" in first
    assert "rank 0 (host-0, pid 100): alive" in rest[0]
    silent = hang_message([alive(0), Seen(beat(1), 61.0, "stopped")], waited=63, limit=60, stacks="s", advice="")
    assert "error (rank 1, after step 57): the run waits for it: its heart stopped 61 s ago" in silent
    assert "SIGSTOP" in silent
    nobody = hang_message([alive(0), alive(1)], waited=63, limit=60, stacks="s", advice="")
    assert nobody.startswith("error (all ranks, after step 57): all of them wait in collective calls")
    alone = hang_message([alive(0, "data", "reads data, a.py:3 in get")], waited=63, limit=60, stacks="s", advice="")
    assert alone.startswith("error (rank 0, after step 57): nothing was finished in step 58: reads data, a.py:3 in get")
    crowd = hang_message([alive(n) for n in range(40)], waited=1, limit=1, stacks="s", advice="")
    assert "and 40 other ranks" in crowd


def test_limits_come_from_what_was_finished() -> None:
    limits = StepLimits(None, patience=600)
    assert limits.limit("step") == 600
    for _ in range(3):
        limits.finished("step", 0.1)
    assert limits.limit("step") == 50
    assert limits.limit("evaluation") == limits.limit("other") == 600
    for _ in range(20):
        limits.finished("step", 10.0)
    assert limits.limit("step") == 200
    assert StepLimits(5, patience=600).limit("step") == 5
    assert StepLimits(5, patience=600).limit("other") == 600
    for _ in range(3):
        limits.finished("evaluation", 0.01, "eval")
    assert limits.limit("evaluation", "eval") == 50
    assert limits.limit("evaluation", "mmlu/5-shot") == 600  # one batch is a whole task


def test_beats_are_whole_or_not_there(tmp_path: Path) -> None:
    hearts = Heartbeats(tmp_path)
    mine = Beat.of_this_process(3)
    hearts.write(mine)
    assert hearts.read(3) == mine
    (tmp_path / "rank-3").write_text('{"rank": 3, "ho')
    assert hearts.read(3) is None
    (tmp_path / "rank-3").write_text("[]")
    assert hearts.read(3) is None
    assert process_state(mine) == "runs"
    assert process_state(beat(1)) is None  # of another machine
    hearts.remove(3)
    assert not tmp_path.exists()
    hearts.write(mine)  # the folder is gone: a run does not end of that


def test_states_of_processes_of_this_machine() -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    theirs = Beat(0, "h", machine(), process.pid or 0)
    assert process_state(theirs) == "runs"
    os.kill(process.pid or 0, signal.SIGSTOP)
    until = time.monotonic() + 5
    while process_state(theirs) != "stopped" and time.monotonic() < until:
        time.sleep(0.01)
    assert process_state(theirs) == "stopped"
    process.kill()
    while process_state(theirs) != "gone" and time.monotonic() < until:
        time.sleep(0.01)
    assert process_state(theirs) == "gone"  # a zombie is
    process.join()


def test_place_of_the_main_thread() -> None:
    found = main_place()
    assert found.kind == "code"
    assert "test_watchdog.py" in found.text
    assert found.text.endswith("in test_place_of_the_main_thread")
    in_call = _calling("all_reduce", main_place)
    assert in_call.kind == "collective"
    assert in_call.text.startswith("waits in all_reduce, ")


def _calling(name: str, function: Any, file: str = ALL_REDUCE) -> Any:
    """Calls `function` from a function of that name in such a file."""
    scope: dict[str, Any] = {}
    exec(compile(f"def {name}(function):\n    return function()\n", file, "exec"), scope)
    return scope[name](function)


def rank_main(rank: int, world: int, folder: str, what: str, limit: float, heart_limit: float) -> None:
    run = Path(folder)
    log = os.open(run / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    limits = StepLimits(limit, patience=600)
    watchdog = Watchdog(
        Heartbeats(run / "heartbeats"), run, limits, rank=rank, world=world, heart_limit=heart_limit, ends=True
    )
    watchdog.start()
    watchdog.at_step(57)
    watchdog.begins("step 58", "step")
    if what == "fails" and rank == 1:
        watchdog.failed("no memory", 1)
        os._exit(1)
    if what == "user" and rank == 1:
        time.sleep(120)
    elif what == "runs":
        for step in range(100):
            watchdog.begins(f"step {step}", "step")
            time.sleep(0.1)
        watchdog.stop()
    else:
        _calling("all_reduce", partial(time.sleep, 120))


def run_ranks(folder: Path, what: str, *, limit: float = 600.0, heart_limit: float = 40.0, world: int = 2) -> list[Any]:
    (folder / "heartbeats").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=rank_main, args=(rank, world, str(folder), what, limit, heart_limit))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def ended(ranks: list[Any], folder: Path, timeout: float = 60.0) -> str:
    until = time.monotonic() + timeout
    for rank in ranks:
        rank.join(max(0.0, until - time.monotonic()))
        if rank.exitcode is None:
            rank.kill()
    return (folder / "log").read_text() if (folder / "log").exists() else ""


@pytest.mark.slow
def test_a_rank_in_user_code_is_named_and_all_end(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, "user", limit=7)
    log = ended(ranks, tmp_path)
    assert [rank.exitcode for rank in ranks] == [LOST_CONTACT] * 2
    assert log.count("error (") == 1, log
    assert "error (rank 1, after step 57): the run waits for it" in log
    assert "test_watchdog.py" in log
    assert "rank 0 (" in log
    assert "waits in all_reduce" in log
    for rank in range(2):
        assert "rank_main" in (tmp_path / f"hang/rank-{rank}.txt").read_text()
    assert "error (rank 1" in (tmp_path / "hang/report.txt").read_text()


@pytest.mark.long  # tests/faults does it to a real run
def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, "hang", heart_limit=8)
    time.sleep(1)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    ranks[0].join(60)
    ranks[1].kill()
    log = ended(ranks, tmp_path)
    assert ranks[0].exitcode == LOST_CONTACT
    assert "error (rank 1, after step 57): the run waits for it: its heart stopped" in log
    assert "SIGSTOP" in log


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_ranks_that_were_stopped_for_a_while_go_on(tmp_path: Path, signum: signal.Signals) -> None:
    """All of them, as when a laptop sleeps; and one that is really gone is a reason to end."""
    ranks = run_ranks(tmp_path, "runs" if signum == signal.SIGSTOP else "hang", limit=6)
    time.sleep(1)
    for rank in ranks if signum == signal.SIGSTOP else ranks[1:]:
        os.kill(rank.pid, signum)
    time.sleep(8)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGCONT)
    log = ended(ranks, tmp_path)
    if signum == signal.SIGSTOP:
        assert [rank.exitcode for rank in ranks] == [0, 0], log
        assert log == ""
        assert not (tmp_path / "heartbeats").exists()
    else:
        assert [rank.exitcode for rank in ranks] == [LOST_CONTACT, -signal.SIGKILL], log
        assert log.count("error (") == 1


@pytest.mark.slow
def test_a_peer_that_failed_ends_a_rank_that_cannot_notice(tmp_path: Path) -> None:
    """As with NCCL, whose calls do not return when a peer is gone."""
    ranks = run_ranks(tmp_path, "fails", world=3)
    log = ended(ranks, tmp_path)
    assert [rank.exitcode for rank in ranks] == [LOST_CONTACT, 1, LOST_CONTACT]
    assert log.count("ended       after step 57, because rank 1 failed: no memory") == 1, log


def watchdog(tmp_path: Path, hearts: Heartbeats | None = None, **changes: Any) -> Watchdog:
    """Rank 0, whose thread is not started; `limit` is for all that it does."""
    settings: dict[str, Any] = {"rank": 0, "world": 2, "heart_limit": 40, "ends": False, **changes}
    limits = StepLimits(None, patience=settings.pop("limit", 600))
    return Watchdog(hearts or Heartbeats(tmp_path), tmp_path, limits, **settings)


def waits(watching: Watchdog, seconds: float, **silent: float) -> bool:
    """Whether it calls it a hang after so many seconds; `rank_1=50`: without a sign of life of rank 1 for 50."""
    watching.look()
    now = time.monotonic()
    watching._since = now - seconds
    for name, since in silent.items():
        rank = int(name.removeprefix("rank_"))
        watching._peers[rank] = (watching._peers[rank][0], now - since)
    watching._tick(now)
    return watching.ending.is_set()


def test_a_rank_that_gets_on_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that writes a large checkpoint, in a rank whose own limit has passed."""
    monkeypatch.setattr("llmtrain.training.watchdog._COLLECT", 0.1)
    hearts = Heartbeats(tmp_path)
    hearts.write(beat(1, since=2.0))
    assert not waits(watchdog(tmp_path), 700)
    assert capsys.readouterr().err == ""
    hearts.write(beat(1, since=700.0))
    assert waits(watchdog(tmp_path), 700)
    assert "the limit is 600 s" in (report := capsys.readouterr().err)
    assert report.rstrip().endswith("If it only needs longer: dist_timeout.")


def test_on_a_full_disk_no_rank_counts_as_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hearts = Heartbeats(tmp_path)
    hearts.write(beat(1))
    (tmp_path / ".rank-0").mkdir()  # where this rank writes first
    assert not hearts.write(beat(0))
    assert not waits(watchdog(tmp_path), 50, rank_1=50)
    (tmp_path / ".rank-0").rmdir()
    assert waits(watchdog(tmp_path), 50, rank_1=50)
    assert "error (rank 1, after step 57): the run waits for it: its heart stopped 50 s ago" in (
        report := capsys.readouterr().err
    )
    assert "the limit is 40 s" in report
    assert report.rstrip().endswith("If it only needs longer: watchdog.heart_limit.")


class Slow(Heartbeats):
    """A folder that hangs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mended, self.entered = threading.Event(), threading.Event()

    def write(self, beat: Beat) -> bool:
        self.entered.set()
        self.mended.wait(30)
        return True


def test_training_does_not_wait_for_a_folder_that_hangs(tmp_path: Path) -> None:
    hearts = Slow(tmp_path)
    watching = watchdog(tmp_path, hearts)
    teller = threading.Thread(target=watching._tick, args=(time.monotonic(),))
    teller.start()
    assert hearts.entered.wait(30)
    training = threading.Thread(target=watching.begins, args=("step 58", "step"))
    training.start()
    training.join(5)
    waited = training.is_alive()
    hearts.mended.set()
    teller.join()
    assert not waited


class Counting(Heartbeats):
    """Knows who was looked at."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read_of: list[int] = []

    def read(self, rank: int) -> Beat | None:
        self.read_of.append(rank)
        return super().read(rank)


def test_a_thousand_ranks_do_not_read_a_thousand_files_each(tmp_path: Path) -> None:
    hearts = Counting(tmp_path)
    crowd: dict[str, Any] = {"world": 1000, "rank": 17, "near": range(16, 24)}
    watching = watchdog(tmp_path, hearts, heart_limit=6, **crowd)
    assert watching.heart_limit == 30  # a beat comes every ten seconds
    watching._since -= 20
    watching._tick(time.monotonic())
    assert hearts.read_of == [16, 18, 19, 20, 21, 22, 23]
    hearts.read_of.clear()
    watching._since -= 600
    watching._tick(time.monotonic())
    assert len(set(hearts.read_of)) == 999


def test_a_failure_that_comes_again_gives_its_exit_code_to_all(tmp_path: Path) -> None:
    watchdog = Watchdog(None, tmp_path, StepLimits(None, patience=9), rank=0, world=2, heart_limit=40, ends=False)
    failed = Seen(beat(1, failure="train_loader: no such shard", code=2, ended="failed"), 1.0, "gone")
    message, code = following(watchdog, failed, [Seen(beat(0), 0.0, "alive"), failed])
    assert code == 2
    assert "because rank 1 failed: train_loader: no such shard" in message
    crashed = Seen(beat(1, failure="crash", code=1, ended="failed"), 1.0, "gone")
    assert following(watchdog, crashed, [Seen(beat(0), 0.0, "alive"), crashed])[1] == LOST_CONTACT


def test_ranks_that_have_all_come_to_an_exchange_wait_for_the_network(tmp_path: Path) -> None:
    """After a step a rank may be busy for long (it saves), and the others wait for it; a cut shall be named before."""
    limits = StepLimits(None, patience=600)
    for _ in range(3):
        limits.finished("step", 0.1)
    hearts = Heartbeats(tmp_path)
    watchdog = Watchdog(hearts, tmp_path, limits, rank=0, world=2, heart_limit=40, ends=False)
    watchdog.begins("after step 57")
    watchdog.exchanges(True)
    assert watchdog.limit(watchdog.look()) == 600  # of the other nothing is known
    hearts.write(beat(1, phase="after step 57"))
    assert watchdog.limit(watchdog.look()) == 600
    hearts.write(beat(1, count=1, phase="after step 57: ranks exchange numbers"))
    assert watchdog.limit(watchdog.look()) == 50
    watchdog.exchanges(False)
    assert watchdog.limit(watchdog.look()) == 600


def test_the_rank_that_is_left_says_whose_host_is_gone(tmp_path: Path) -> None:
    """Of a process on another host nothing can be looked up: its connection is closed, and its heart has stopped."""
    hearts = Heartbeats(tmp_path)
    hearts.write(beat(0))
    watchdog = Watchdog(hearts, tmp_path, StepLimits(None, patience=9), rank=1, world=2, heart_limit=40, ends=False)
    watchdog.interval = 0.05
    message, code = following(watchdog, *watchdog.first_cause(1.5))
    who = r"error \(rank 0, after step 57\): rank 0 \(host-0, pid 100\)"
    assert re.match(who + r": its heart stopped [12] s ago\. It was ended from outside", message), message
    assert code == LOST_CONTACT


def launcher_main(folder: str) -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0")
    multiprocessing.get_context("fork").Process(target=orphan_main, args=(folder,)).start()
    time.sleep(120)


def orphan_main(folder: str) -> None:
    run = Path(folder)

    def asked(signum: int, frame: Any) -> None:
        (run / "asked").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, asked)
    hearts = Heartbeats(run / "heartbeats")
    Watchdog(hearts, run, StepLimits(None, patience=9), rank=0, world=1, heart_limit=40, ends=True).start()
    time.sleep(120)


def test_a_rank_whose_launcher_was_killed_is_asked_to_save_and_end(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    launcher = multiprocessing.get_context("fork").Process(target=launcher_main, args=(str(tmp_path),))
    launcher.start()
    until = time.monotonic() + 30
    while not (tmp_path / "heartbeats/rank-0").exists() and time.monotonic() < until:
        time.sleep(0.05)
    launcher.kill()
    launcher.join()
    while not (tmp_path / "asked").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "asked").exists()
