"""How many cores there are for this process."""

import os


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_of_a_rank(ranks: int) -> int | None:
    """Threads for each of this machine's ranks: ranks that start one for each core take the cores from each other.

    None where whoever started the run has said it (OMP_NUM_THREADS); torchrun always says 1, which is no wish.

    Args:
        ranks: how many run on this machine.
    """
    if "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return max(1, available_cores() // ranks)
