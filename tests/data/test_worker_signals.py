"""A loader worker and SIGTERM, with real workers."""

import os
import signal
import time

from torch.utils.data import DataLoader, Dataset

from llmtrain.data.worker_signals import ignore_others_sigterm


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> int:
        time.sleep(0.005)
        return index


def test_a_signal_of_somebody_else_does_not_stop_the_data() -> None:
    batches = iter(DataLoader(Numbers(), batch_size=4, num_workers=1, worker_init_fn=ignore_others_sigterm))
    next(batches)
    if (sender := os.fork()) == 0:
        os.kill(batches._workers[0].pid, signal.SIGTERM)  # type: ignore[attr-defined]
        os._exit(0)
    os.waitpid(sender, 0)
    assert len(list(batches)) == 49


def test_the_ranks_own_signal_ends_it() -> None:
    batches = iter(DataLoader(Numbers(), batch_size=4, num_workers=1, worker_init_fn=ignore_others_sigterm))
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
