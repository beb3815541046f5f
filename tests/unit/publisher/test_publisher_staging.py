"""Staging on a machine without a GPU: copies at once, finishes elsewhere, keeps nothing alive, counts what it skips."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from sidestep.protocol.messages import Kind, LearningRates, Losses, Message
from sidestep.trainer_hooks.accounts import Skip
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.pinned_ring import PinnedRing, Slot
from sidestep.trainer_hooks.staging import Arrays, Staging


def rates(arrays: Arrays) -> list[Message]:
    return [LearningRates(step=1, rates=arrays["rates"])]


def no_message(_arrays: Arrays) -> list[Message]:
    return []


def test_cpu_tensors_are_copied_when_staged() -> None:
    staging = Staging()
    tensor = torch.arange(4, dtype=torch.float64)
    assert staging.stage({"rates": tensor}, rates)
    tensor.zero_()  # a trainer changes its tensors in place
    (message,) = staging.poll()
    assert isinstance(message, LearningRates)
    assert message.rates.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert staging.poll() == []
    assert staging.num_pending == 0


def test_owned_tensors_are_not_copied() -> None:
    staging = Staging()
    tensor = torch.arange(4, dtype=torch.float64)
    seen: list[Arrays] = []

    def finish(arrays: Arrays) -> list[Message]:
        seen.append(arrays)
        return []

    staging.stage({"owned": tensor}, finish, owned=True)
    staging.poll()
    assert np.shares_memory(seen[0]["owned"], tensor.numpy())


@pytest.mark.parametrize("owned", [False, True])
def test_every_dtype_and_shape_arrives(owned: bool) -> None:
    seen: dict[str, Any] = {}

    def finish(arrays: Arrays) -> list[Message]:
        seen.update(arrays)
        return []

    tensors = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "strided": torch.arange(12).view(3, 4).t(),
        "with_gradient": torch.ones(2, requires_grad=True) * 2,
    }
    expected = {name: tensor.detach().float().tolist() for name, tensor in tensors.items()}
    staging = Staging()
    assert staging.stage(tensors, finish, owned=owned)
    staging.poll()
    assert {name: array.astype(np.float32).tolist() for name, array in seen.items()} == expected
    assert seen["half"].dtype == np.float16
    assert seen["brain"].dtype == np.float32


def test_no_tensor_lives_longer_than_the_call() -> None:
    staging = Staging()
    tensor = torch.ones(1_000, requires_grad=True)
    loss = (tensor * 2).sum()
    gone = [weakref.ref(tensor), weakref.ref(loss)]
    assert staging.stage({"tensor": tensor, "loss": loss}, no_message)
    del tensor, loss
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_without_room_nothing_is_copied_and_the_messages_are_counted() -> None:
    staging = Staging(max_host_bytes=1_000)
    assert staging.stage({"rates": torch.zeros(100, dtype=torch.float64)}, rates, kinds=[Kind.LEARNING_RATES], step=1)
    assert not staging.stage(
        {"rates": torch.zeros(100, dtype=torch.float64)}, rates, kinds=[Kind.LEARNING_RATES, Kind.LOSSES], step=2
    )
    assert staging.take_skips() == [
        Skip(Kind.LEARNING_RATES, 2, announced=False),
        Skip(Kind.LOSSES, 2, announced=False),
    ]
    assert len(staging.poll()) == 1
    assert staging.stage({"rates": torch.zeros(100, dtype=torch.float64)}, rates), "there is room again"
    assert staging.statistics().num_skipped == 1


def test_a_finish_that_fails_is_counted_and_said_once() -> None:
    lines: list[str] = []
    staging = Staging(console=Console(lines.append))

    def fails(_arrays: Arrays) -> list[Message]:
        raise ZeroDivisionError("mine")

    for step in (1, 2):
        assert staging.stage({"x": torch.ones(1)}, fails, kinds=[Kind.LOSSES], step=step)
        assert staging.poll() == []
    assert staging.take_skips() == [Skip(Kind.LOSSES, 1, announced=True), Skip(Kind.LOSSES, 2, announced=True)]
    assert staging.statistics().num_finish_errors == 2
    assert len(lines) == 1
    assert "ZeroDivisionError" in lines[0]


def test_messages_that_a_finish_leaves_out_are_counted() -> None:
    staging = Staging()

    def one_of_two(_arrays: Arrays) -> list[Message]:
        return [Losses(step=4, microstep=0, labelled=0)]

    staging.stage({}, one_of_two, kinds=[Kind.LOSSES, Kind.TOKENS], step=4)
    assert len(staging.poll()) == 1
    assert staging.take_skips() == [Skip(Kind.TOKENS, 4, announced=True)]


def test_tensors_of_an_unknown_device_are_skipped() -> None:
    staging = Staging()
    assert not staging.stage({"x": torch.ones(1, device="meta")}, no_message, kinds=[Kind.LOSSES], step=1)
    assert staging.take_skips() == [Skip(Kind.LOSSES, 1, announced=False)]


def test_entries_that_nobody_polls_are_bounded() -> None:
    staging = Staging()
    results = [staging.stage({"x": torch.ones(1)}, no_message) for _ in range(1_000)]
    assert results.count(True) == 256
    assert results[:256] == [True] * 256


class HostSlot(Slot):
    """A slot whose memory is pageable and whose copies are done when the test says so: there is no GPU here."""

    def __init__(self) -> None:
        super().__init__()
        self.done = False

    def grow(self, size_bytes: int) -> None:
        self._memory = torch.empty(size_bytes, dtype=torch.uint8)

    def copy(self, tensors: Any) -> None:
        self.done = False
        super().copy(tensors)

    def is_done(self) -> bool:
        return self.done


@pytest.fixture
def ring() -> PinnedRing:
    made = PinnedRing(num_slots=2, max_bytes=1 << 20)
    made._slots = (HostSlot(), HostSlot())
    made._free.clear()
    made._free.extend(made._slots)
    return made


def test_slots_hold_tensors_of_any_dtype_side_by_side(ring: PinnedRing) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.arange(5, dtype=torch.float64),
        "none": torch.zeros(0, dtype=torch.float32),
        "flag": torch.tensor(True),
        "matrix": torch.arange(6, dtype=torch.int32).view(2, 3).t(),
    }
    slot = ring.copy(tensors)
    assert slot is not None
    arrays = ring.read(slot)
    assert {name: array.tolist() for name, array in arrays.items()} == {n: t.tolist() for n, t in tensors.items()}
    again = ring.copy({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert again is not None
    assert arrays["wide"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0], "what was read is not the slot's memory any more"


def test_a_ring_without_a_free_slot_takes_nothing(ring: PinnedRing) -> None:
    slots = [ring.copy({"x": torch.ones(4)}) for _ in range(3)]
    assert [slot is None for slot in slots] == [False, False, True]
    assert slots[0] is not None
    ring.read(slots[0])
    assert ring.copy({"x": torch.ones(4)}) is slots[0]


def test_a_ring_grows_to_need_but_not_over_its_bound(ring: PinnedRing) -> None:
    assert ring.size_bytes == 0
    assert ring.copy({"x": torch.zeros(1_100_000, dtype=torch.uint8)}) is None, "over the bound of 1 MiB"
    fits = ring.copy({"x": torch.zeros(400_000, dtype=torch.uint8)})
    assert fits is not None
    assert ring.size_bytes == 512 << 10
    assert ring.copy({"x": torch.zeros(600_000, dtype=torch.uint8)}) is None, "both together would be over it"
    small = ring.copy({"x": torch.zeros(10, dtype=torch.uint8)})
    assert small is not None
    ring.read(fits)
    ring.read(small)
    assert ring.copy({"x": torch.zeros(5, dtype=torch.uint8)}) is small, "the smallest that fits"


def test_a_staging_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="num_slots"):
        Staging(num_slots=0)
    with pytest.raises(ValueError, match="max_host_bytes"):
        Staging(max_host_bytes=0)
