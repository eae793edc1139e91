"""A loader worker and SIGTERM, with real workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from llmtrain.data.worker_signals import OutlivesSigterm


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> int:
        time.sleep(0.005)
        return index


class Loader(OutlivesSigterm, DataLoader[int]):
    pass


def started() -> Any:
    """The iterator of a loader whose worker has read something."""
    batches = iter(Loader(Numbers(), batch_size=4, num_workers=1))
    next(batches)
    return batches


def test_a_signal_of_somebody_else_does_not_stop_the_data() -> None:
    batches = started()
    if (sender := os.fork()) == 0:
        os.kill(batches._workers[0].pid, signal.SIGTERM)
        os._exit(0)
    os.waitpid(sender, 0)
    assert len(list(batches)) == 49


def test_no_thread_of_a_worker_takes_the_signal() -> None:
    """torch starts some before a worker's own code runs."""
    batches = started()
    tasks = Path(f"/proc/{batches._workers[0].pid}/task")
    free = []
    for task in tasks.iterdir():
        fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        if not int(fields["SigBlk"], 16) >> (signal.SIGTERM - 1) & 1:
            free.append(task.name)
    assert len(free) <= 1, free  # the one that waits for it
    del batches


MAKES_SHARED_MEMORY = """
import os
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from torch.utils.data import DataLoader
from llmtrain.data.worker_signals import OutlivesSigterm

class Numbers(list):
    def __getitem__(self, index):
        memory = SharedMemory(create=True, size=8)
        memory.close()
        memory.unlink()
        return index

class Loader(OutlivesSigterm, DataLoader):
    pass

batches = iter(Loader(Numbers(range(200)), num_workers=1))
next(batches)
status = Path(f"/proc/{batches._workers[0].pid}/status").read_text()
print(next(line for line in status.splitlines() if line.startswith("SigBlk")), flush=True)
os._exit(0)
"""


def test_a_worker_that_makes_shared_memory_outlives_it_too() -> None:
    """Streaming does. Python then starts a helper, unless there is one, and unblocks SIGTERM after that."""
    done = subprocess.run([sys.executable, "-c", MAKES_SHARED_MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[1], 16) >> (signal.SIGTERM - 1) & 1


def test_the_rank_itself_takes_it() -> None:
    batches = started()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    del batches


def test_the_ranks_own_signal_ends_it() -> None:
    (worker,) = (batches := started())._workers
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
    del batches
