import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import UserError
from llmtrain.training import failures, watching
from llmtrain.training.agreement import from_rank_zero
from llmtrain.training.checkpoint_folder import Moment
from llmtrain.training.exit_codes import FAILED, LOST_CONTACT, USER_ERROR
from llmtrain.training.failures import advice_for, cause_of, is_consequence, report
from llmtrain.training.save_failures import SaveFailures


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24542",
        "Application timeout caused pair closure",
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation",
        "NCCL error in: ...; ncclRemoteError: A call failed possibly due to a network error or a remote process exited",
        "Connection reset by peer",
    ],
)
def test_errors_of_a_rank_whose_peer_is_gone(text: str) -> None:
    assert is_consequence(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        ValueError("Connection closed by peer"),
        UserError("push: connection refused"),
    ],
)
def test_errors_of_a_rank_itself(error: Exception) -> None:
    assert not is_consequence(error)


def raised(error: Exception, *files: str) -> Exception:
    """The error, as it comes out of functions in such files; the first one calls the second."""
    scope: dict[str, Any] = {"error": error}
    for number, file in enumerate(reversed(files)):
        body = f"call{number - 1}()" if number else "raise error"
        exec(compile(f"def call{number}():\n    {body}\n", file, "exec"), scope)
    with pytest.raises(type(error)) as caught:
        scope[f"call{len(files) - 1}"]()
    return caught.value


def test_a_store_of_data_that_resets_connections_is_no_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, collective = "/x/torch/utils/data/dataloader.py", "/x/torch/distributed/distributed_c10d.py"
    text = "Caught ConnectionResetError in DataLoader worker process 0.\n[Errno 104] Connection reset by peer"
    assert not is_consequence(raised(ConnectionResetError(text), loader, "/x/torch/_utils.py"))
    assert not is_consequence(raised(RuntimeError("Connection closed by peer"), "/x/streaming/base/dataset.py"))
    # Ranks also meet in loaders.
    assert is_consequence(raised(RuntimeError("Connection closed by peer"), loader, collective))
    assert is_consequence(raised(RuntimeError("Connection closed by peer"), collective))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_consequence(raised(ConnectionResetError("[Errno 104] Connection reset by peer"), "/x/user.py"))


def test_causes_and_advice() -> None:
    assert cause_of(MemoryError()) == "MemoryError: no message"
    assert cause_of(KeyError("x")) == "KeyError: 'x'"
    assert len(cause_of(RuntimeError("long " * 200))) == 300
    assert "num_workers" in advice_for("DataLoader worker (pid(s) 7) exited unexpectedly")
    assert "device_train_microbatch_size" in advice_for("CUDA out of memory. Tried to allocate 2 GiB")
    assert advice_for("index out of range") == ""


def test_a_failure_is_one_line_and_leaves_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    monkeypatch.setattr(failures, "end_within", lambda *_: None)
    assert watching.current() is None
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("shape mismatch with hunter2hunter2")
    assert report(raised.value, tmp_path) == FAILED
    output = capsys.readouterr().err
    assert output.startswith("error (rank 3, after step 0): shape mismatch with ")
    assert output.count("\n") == 1
    assert "Traceback: " in output
    assert "raise RuntimeError" in (tmp_path / "failures/rank-3.txt").read_text()
    assert "hunter2hunter2" not in (tmp_path / "failures/rank-3.txt").read_text()
    record = json.loads((tmp_path / "failures/rank-3.json").read_text())
    assert (record["rank"], record["step"], record["code"]) == (3, 0, FAILED)
    assert "hunter2" not in record["cause"]
    assert report(UserError("save_folder: full"), tmp_path) == USER_ERROR
    assert capsys.readouterr().err == "error (rank 3, after step 0): save_folder: full\n"
    assert report(RuntimeError("Connection closed by peer"), tmp_path) == LOST_CONTACT
    capsys.readouterr()


def test_what_all_ranks_know_is_told_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "end_within", lambda *_: None)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError) as raised:
        from_rank_zero(full)
    for error in (raised.value, SaveFailures(tmp_path, "ep0-ba1", 1).give_up(Moment(0, 4, 4, "full"), "no space")):
        said = []
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            report(error, tmp_path)
            said.append(capsys.readouterr().err)
        assert said[0].startswith("error (all ranks, after step 0): ")
        assert said[1] == ""


def test_a_folder_that_cannot_be_written_does_not_hide_the_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "end_within", lambda *_: None)
    monkeypatch.setitem(os.environ, "RANK", "0")
    (tmp_path / "run").touch()
    assert report(RuntimeError("broken"), tmp_path / "run") == FAILED
    assert "broken" in capsys.readouterr().err
