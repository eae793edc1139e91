"""SIGTERM: finish the step, save, leave."""

import signal
import sys
import time
from types import FrameType

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from llmtrain.training.agreement import exchange
from llmtrain.training.checkpoint_saver import CheckpointSaver

# 128 + SIGTERM: what a supervisor expects of a process that was asked to end.
EXIT_CODE = 128 + signal.SIGTERM


class Preempted(Exception):
    """Training has stopped at a SIGTERM, after a checkpoint. Raised on all ranks at the same point."""


class Preemption(Callback):  # type: ignore[misc]
    """When any rank has received SIGTERM, all ranks save after the current step (or evaluation batch) and stop.

    The handler only sets a flag; ranks agree on it by an all-reduce after each batch, so that they stop together.
    Composer's own handler exits at once, without a checkpoint, while other ranks wait in a collective.

    Must stand before the saver in the list of callbacks.
    """

    def __init__(self, saver: CheckpointSaver | None) -> None:
        self.saver = saver
        self.received = False
        self.received_at: float | None = None
        """When the first one came, in `time.monotonic`: what is left to be done has some 30 seconds from then."""

    def install(self) -> None:
        """Takes over SIGTERM; called after the Trainer was made, since importing Composer installs its own handler.

        A SIGTERM that an earlier trainer of this process has received, and not seen, counts.
        """
        earlier = getattr(signal.signal(signal.SIGTERM, self._handle), "__self__", None)
        if isinstance(earlier, Preemption):
            self.received = self.received or earlier.received

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
        if self.received_at is None:
            self.received_at = time.monotonic()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._stop_if_asked(state)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        # An evaluation may take longer than the time that is left. The rest of it is lost; training is not.
        self._stop_if_asked(state)

    def _stop_if_asked(self, state: State) -> None:
        flag = state.device.tensor_to_device(torch.tensor([int(self.received)], dtype=torch.int32))
        exchange(flag, "MAX")
        if not flag.item():
            return
        if self.received_at is None:  # another rank has got the signal; rank 0 may be the one that waits for uploads
            self.received_at = time.monotonic()
        step = int(state.timestamp.batch)
        if self.saver is not None and step > 0:
            self.saver.save(state)
        if dist.get_global_rank() == 0:
            saved = "saved; the same command continues from here" if self.saver else "nothing saved: no save_folder"
            print(f"SIGTERM: stopped after step {step}; {saved}", file=sys.stderr, flush=True)
        raise Preempted
