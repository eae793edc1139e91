import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from llmtrain.config.positions import Position
from llmtrain.config.problems import ConfigError, Problem
from llmtrain.errors import UserError
from llmtrain.prep.engines.local import LocalEngine
from llmtrain.prep.run import Options

# The workers import this module by its file: it is no package.
TASKS = """
import os, signal, sys, time
from llmtrain.config.problems import ConfigError, Problem
from llmtrain.config.positions import Position
from llmtrain.errors import UserError

HEAVY = {"torch", "streaming", "composer", "transformers", "datasets", "pyarrow", "matplotlib", "wandb"}

def note(folder, number, advance=None):
    advance(10)
    open(f"{folder}/{number}", "w").write(f"{os.getpid()} {os.getppid()}")
    time.sleep(0.05)

def heavy(folder, number, advance=None):
    open(f"{folder}/{number}", "w").write(repr(sorted(HEAVY & set(sys.modules))))

def mistake(folder, number, advance=None):
    if number == 3:
        raise UserError("docs.jsonl, line 7: not JSON")
    time.sleep(60)

def config_mistake(folder, number, advance=None):
    raise ConfigError("a.yaml", [Problem(Position("a.yaml", 3), ("x",), "bad")])

def bug(folder, number, advance=None):
    raise ZeroDivisionError("seven")

def killed(folder, number, advance=None):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def sleeps(folder, number, advance=None):
    open(f"{folder}/{number}", "w").write(str(os.getpid()))
    time.sleep(300)

def prints(folder, number, advance=None):
    print("hello from a stage")
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    (tmp_path / "engine_tasks.py").write_text(TASKS)
    (tmp_path / "made").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("engine_tasks", None)
    import engine_tasks

    return lambda name: partial(getattr(engine_tasks, name), str(tmp_path / "made"))


def made(tmp_path):
    return {int(path.name): path.read_text() for path in (tmp_path / "made").iterdir()}


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_several_processes_share_the_units_and_report_bytes(tmp_path, tasks):
    done = []
    LocalEngine(3).map(tasks("note"), range(20), done.append)
    found = made(tmp_path)
    assert sorted(found) == list(range(20))
    assert len(set(found.values())) == 3
    assert all(text.split()[1] == str(os.getpid()) for text in found.values())
    assert sum(done) == 200


@pytest.mark.parametrize(("processes", "numbers"), [(1, range(3)), (8, [5])])
def test_one_process_is_this_one(tmp_path, tasks, processes, numbers):
    LocalEngine(processes).map(tasks("note"), numbers, lambda n: None)
    assert {text.split()[0] for text in made(tmp_path).values()} == {str(os.getpid())}


def test_workers_start_light(tmp_path, tasks):
    import torch  # noqa: F401  (this process is not light)

    LocalEngine(2).map(tasks("heavy"), range(2), lambda n: None)
    assert set(made(tmp_path).values()) == {"[]"}


@pytest.mark.parametrize("name", ["mistake", "config_mistake"])
def test_a_users_mistake_arrives_as_it_was_and_stops_the_others(tmp_path, tasks, name):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        LocalEngine(4).map(tasks(name), range(8), lambda n: None)
    if name == "mistake":
        assert str(caught.value) == "docs.jsonl, line 7: not JSON"
    else:
        assert str(caught.value) == str(ConfigError("a.yaml", [Problem(Position("a.yaml", 3), ("x",), "bad")]))
    assert time.monotonic() - start < 30


def test_a_bug_comes_with_the_workers_traceback(tmp_path, tasks):
    with pytest.raises(RuntimeError, match=r"(?s)partition \d failed.*in bug.*ZeroDivisionError: seven"):
        LocalEngine(2).map(tasks("bug"), range(2), lambda n: None)


def test_a_worker_that_dies_names_its_partition(tmp_path, tasks):
    with pytest.raises(UserError, match=r"was killed \(SIGKILL\) while it worked on partition 2.*memory"):
        LocalEngine(3).map(tasks("killed"), range(3), lambda n: None)


def test_what_a_unit_prints_does_not_disturb_the_pipe(tmp_path, tasks, capfd):
    LocalEngine(2).map(tasks("prints"), range(4), lambda n: None)
    assert capfd.readouterr().out.count("hello from a stage") == 4


def test_works_in_a_thread(tmp_path, tasks):
    thread = threading.Thread(target=LocalEngine(2).map, args=(tasks("note"), range(4), lambda n: None))
    thread.start()
    thread.join()
    assert sorted(made(tmp_path)) == [0, 1, 2, 3]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, tasks, how):
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import engine_tasks; from functools import partial; "
        "from llmtrain.prep.engines.local import LocalEngine; "
        f"LocalEngine(2).map(partial(engine_tasks.sleeps, {str(tmp_path / 'made')!r}), range(4), print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    until(lambda: len(made(tmp_path)) == 2 and all(made(tmp_path).values()))
    pids = [int(text) for text in made(tmp_path).values()]
    assert all(map(is_running, pids))
    parent.send_signal(how)
    status = parent.wait(20)
    assert status == (143 if how == signal.SIGTERM else -how)
    until(lambda: not any(map(is_running, pids)), seconds=10)


def test_the_number_of_processes_changes_nothing(corpus, digest):
    expected = corpus.reference()
    assert len({name.split(".")[1] for name in expected if "shard" in name}) > 12
    for processes in (2, 3):
        out = str(corpus.folder / f"out{processes}")
        corpus.make(Options(processes=processes), out=out)
        assert digest(out) == expected


def test_bad_input_in_a_worker(corpus):
    with corpus.files[2].open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"2\.jsonl, line 401: .*on_error"):
        corpus.make(Options(processes=2))
    assert not corpus.out.exists()
