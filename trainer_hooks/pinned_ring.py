"""Page-locked host memory that device tensors are copied into, and the events that say when."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

_ALIGNMENT_BYTES = 64
_SMALLEST_SLOT_BYTES = 64 << 10


def is_capturing() -> bool:
    """Return whether the caller's stream is being captured into a CUDA graph: then nothing may be asked or launched."""
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class Slot:
    """One piece of pinned memory, the views of what is being copied into it, and the event behind the copies."""

    def __init__(self) -> None:
        """Start without memory."""
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, torch.Tensor] = {}
        self._events: list[torch.cuda.Event] = []

    @property
    def size_bytes(self) -> int:
        """Bytes of its memory."""
        return self._memory.nbytes

    def grow(self, size_bytes: int) -> None:
        """Replace its memory by ``size_bytes`` of pinned memory."""
        self._memory = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Launch the copies on the current stream of each tensor's device, and an event behind them."""
        self._views = {}
        at = 0
        for name, tensor in tensors.items():
            view = self._memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor, non_blocking=True)
            self._views[name] = view
            at += _aligned(tensor.nbytes)
        self._events = []
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def is_done(self) -> bool:
        """Return whether the copies are done; asks the device, never waits for it."""
        return all(event.query() for event in self._events)  # type: ignore[no-untyped-call]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return copies of what arrived, so that the slot can be used again."""
        return {name: view.numpy().copy() for name, view in self._views.items()}


class PinnedRing:
    """A fixed number of slots, each grown to what it once needed, within a bound on all of them together."""

    def __init__(self, *, num_slots: int, max_bytes: int) -> None:
        """Start with slots that hold no memory.

        Raises:
            ValueError: ``num_slots`` is not positive.
        """
        if num_slots <= 0:
            raise ValueError(f"num_slots is {num_slots}; it must be positive")
        self._slots = tuple(Slot() for _ in range(num_slots))
        self._free: deque[Slot] = deque(self._slots)
        self._max_bytes = max_bytes

    @property
    def size_bytes(self) -> int:
        """Pinned bytes of all slots."""
        return sum(slot.size_bytes for slot in self._slots)

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> Slot | None:
        """Launch copies of device tensors into a free slot; None without one, or while a graph is captured."""
        if is_capturing():
            return None
        sent = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
        needed = sum(_aligned(tensor.nbytes) for tensor in sent.values())
        slot = self._take(needed)
        if slot is not None:
            slot.copy(sent)
        return slot

    def read(self, slot: Slot) -> dict[str, NDArray[Any]]:
        """Return copies of what arrived in ``slot``, and make it free again; on any thread."""
        try:
            return slot.arrays()
        finally:
            self._free.append(slot)

    def _take(self, needed_bytes: int) -> Slot | None:
        """Return the first free slot that is large enough, else the smallest one, grown."""
        free = [self._free.popleft() for _ in range(len(self._free))]
        if not free:
            return None
        fitting = [slot for slot in free if slot.size_bytes >= needed_bytes]
        slot = min(fitting or free, key=lambda slot: slot.size_bytes)
        if not fitting:
            wanted = max(_SMALLEST_SLOT_BYTES, 1 << (needed_bytes - 1).bit_length())
            if self.size_bytes - slot.size_bytes + wanted > self._max_bytes:
                self._free.extend(free)
                return None
            slot.grow(wanted)
        self._free.extend(other for other in free if other is not slot)
        return slot
