"""Numbers below 1.2e-38 (float32) become 0 on the CPU, instead of being computed slowly.

With ALiBi the softmax weights of far keys are such numbers, and the CPU takes a hundred cycles and more for each. The
setting belongs to a thread, and torch's threads take it over from the one that starts them: it must be set before the
first parallel operation.
"""

import torch

NOTE = "denormals are flushed to zero"


def flush_denormals() -> bool:
    """Flushes denormals in this thread and in those that torch will start; False where the processor cannot.

    Results change by less than 1.2e-38 a number, gradients included: a gradient (or a moment of Adam) so small becomes
    0.
    """
    return torch.set_flush_denormal(True)


def flushed() -> bool:
    """Whether this thread flushes denormals."""
    return not (torch.tensor(1e-30) * 1e-10).item()
