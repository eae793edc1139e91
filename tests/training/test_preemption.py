"""SIGTERM between two trainers of one process."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain.training.preemption import Preempted, Preemption


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


def test_a_rank_that_another_one_has_told_knows_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for uploads no longer than a grace that begins with the signal, whoever has got that."""

    def another_rank_is_asked(flag: torch.Tensor, **_: Any) -> None:
        flag.fill_(1)

    monkeypatch.setattr("composer.utils.dist.all_reduce", another_rank_is_asked)
    device = SimpleNamespace(tensor_to_device=lambda tensor: tensor)
    preemption = Preemption(None)
    with pytest.raises(Preempted):
        preemption.batch_checkpoint(SimpleNamespace(device=device, timestamp=SimpleNamespace(batch=3)), None)
    assert not preemption.received
    assert preemption.received_at is not None
