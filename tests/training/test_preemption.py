"""SIGTERM between two trainers of one process."""

import os
import signal
from collections.abc import Iterator

import pytest

from llmtrain.training.preemption import Preemption


@pytest.fixture(autouse=True)
def _handler_is_put_back() -> Iterator[None]:
    earlier = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, earlier)


def test_a_sigterm_that_the_first_trainer_did_not_see_stops_the_second() -> None:
    first, second, third = Preemption(None), Preemption(None), Preemption(None)
    first.install()
    second.install()
    assert not second.received
    os.kill(os.getpid(), signal.SIGTERM)
    assert second.received
    third.install()
    assert third.received
