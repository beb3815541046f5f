"""Staging on a real device: nothing waits, copies are ordered behind the caller's work, a capture is left alone."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch

from sidestep.protocol.messages import Kind, LearningRates, Message
from sidestep.trainer_hooks.accounts import Skip
from sidestep.trainer_hooks.staging import Arrays, Staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Finished:
    """Keeps what a finish got."""

    def __init__(self) -> None:
        self.arrays: list[Arrays] = []

    def __call__(self, arrays: Arrays) -> list[Message]:
        self.arrays.append(arrays)
        return [LearningRates(step=1, rates=arrays["rates"])] if "rates" in arrays else []


def busy(device: torch.device) -> torch.Tensor:
    """Keep the device at work for a while."""
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    return torch.arange(4, dtype=torch.float64, device=device)


def test_a_copy_behind_long_work_is_not_waited_for() -> None:
    staging, finished = Staging(), Finished()
    device = torch.device("cuda")
    staging.stage({"warm": torch.ones(1, device=device)}, Finished())  # page-locks the first slot
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = busy(device)
        assert staging.stage({"rates": result, "host": torch.ones(2)}, finished, kinds=[Kind.LEARNING_RATES], step=1)
        result.zero_()  # on the same stream, behind the copy
        staging.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    staging.advance()
    staging.poll()
    assert finished.arrays[0]["rates"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert finished.arrays[0]["host"].tolist() == [1.0, 1.0]


def test_a_ring_that_is_never_ready_skips_before_launching() -> None:
    staging = Staging(num_slots=2)
    device = torch.device("cuda")
    results = []
    for step in range(4):
        rates = busy(device)
        results.append(staging.stage({"rates": rates}, Finished(), kinds=[Kind.LEARNING_RATES], step=step))
    assert results == [True, True, False, False]
    assert staging.take_skips() == [Skip(Kind.LEARNING_RATES, step, announced=False) for step in (2, 3)]
    torch.cuda.synchronize()


def test_every_dtype_arrives_from_the_device() -> None:
    staging, finished = Staging(), Finished()
    tensors: dict[str, Any] = {
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16, device="cuda"),
        "flags": torch.tensor([True, False], device="cuda"),
        "strided": torch.arange(12, device="cuda").view(3, 4).t(),
        "empty": torch.zeros(0, 3, device="cuda"),
        "scalar": torch.tensor(7, device="cuda"),
    }
    assert staging.stage(tensors, finished)
    torch.cuda.synchronize()
    staging.advance()
    staging.poll()
    assert {name: array.tolist() for name, array in finished.arrays[0].items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_no_device_tensor_lives_longer_than_the_call() -> None:
    staging = Staging()
    tensor = busy(torch.device("cuda"))
    gone = weakref.ref(tensor)
    assert staging.stage({"rates": tensor}, Finished())
    del tensor
    gc.collect()
    assert gone() is None
    torch.cuda.synchronize()


def test_nothing_is_asked_or_launched_while_a_graph_is_captured() -> None:
    staging, finished = Staging(), Finished()
    value = torch.ones(4, dtype=torch.float64, device="cuda")
    assert staging.stage({"rates": value}, finished)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = value * 2
        assert not staging.stage({"rates": doubled}, finished, kinds=[Kind.LEARNING_RATES], step=1)
        staging.advance()
        time.sleep(0.05)
        assert staging.poll() == []
    graph.replay()
    staging.advance()
    assert len(staging.poll()) == 1
    torch.cuda.synchronize()
