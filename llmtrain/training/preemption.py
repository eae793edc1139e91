"""SIGTERM: finish the step, save, leave."""

import signal
import sys
from types import FrameType

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from llmtrain.training.checkpoint_saver import CheckpointSaver

# 128 + SIGTERM: what a supervisor expects of a process that was asked to end.
EXIT_CODE = 128 + signal.SIGTERM


class Preemption(Callback):  # type: ignore[misc]
    """When any rank has received SIGTERM, all ranks save after the current step and stop.

    The handler only sets a flag; ranks agree on it by an all-reduce after each step, so that they stop at the same one.
    Composer's own handler exits at once, without a checkpoint, while other ranks wait in a collective.

    Must stand before the saver in the list of callbacks.
    """

    def __init__(self, saver: CheckpointSaver | None) -> None:
        self.saver = saver
        self.received = False
        self.stopped_at: int | None = None

    def install(self) -> None:
        """Takes over SIGTERM; called after the Trainer was made, since importing Composer installs its own handler."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        flag = state.device.tensor_to_device(torch.tensor([int(self.received)], dtype=torch.int32))
        dist.all_reduce(flag, reduce_operation="MAX")
        if not flag.item():
            return
        self.stopped_at = int(state.timestamp.batch)
        if self.saver is not None:
            self.saver.save(state)
        state.evaluators = []  # no evaluation at the end: the grace period is short
        state.stop_training()
        if dist.get_global_rank() == 0:
            saved = "saved; the same command continues from here" if self.saver else "nothing saved: no save_folder"
            print(f"SIGTERM: stopped after step {self.stopped_at}; {saved}", file=sys.stderr, flush=True)
