"""What Composer needs from the environment and torchrun does not set, in one place."""

import os


def complete_environment() -> None:
    """Adds NODE_RANK where torchrun started this process: it calls it GROUP_RANK.

    The others that Composer reads (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) it sets.
    """
    if "RANK" in os.environ and "GROUP_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])
