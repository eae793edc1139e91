"""The garbage collector around imports and figures."""

import gc
import subprocess
import sys

import pytest

from llmtrain.garbage import collected_afterwards, importing


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def knots() -> int:
    return sum(type(each) is Knot for each in gc.get_objects())


def test_what_is_made_inside_is_gone_and_nothing_else_was_looked_at() -> None:
    gc.collect()
    kept = Knot()
    with collected_afterwards():
        for _ in range(10_000):
            Knot()
        assert knots() == 10_001
    assert knots() == 1
    assert gc.isenabled()
    assert kept.me is kept


@pytest.mark.parametrize("block", [importing, collected_afterwards])
def test_who_has_switched_it_off_keeps_it_off_also_after_an_error(block: type) -> None:
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError), block():
            _ = 1 / 0
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_imports_are_never_looked_through_again_and_nobody_complains_at_the_end() -> None:
    """nanobind, which triton and others use, prints what is not freed by the end of the process."""
    script = """
import gc
from llmtrain.garbage import importing
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
with importing():
    import torch, triton
assert collections == [] and gc.isenabled()
assert len(gc.get_objects()) < 1000 < gc.get_freeze_count()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
