"""Tensors on their way to the host: pinned slots and events for the device's, plain copies for the CPU's.

``stage`` launches copies on the caller's stream and returns. Whether they are done is asked, never waited for, and
asked on the training thread only (``advance``): while any CUDA graph is being captured, a query from another thread
would break the capture. What comes after the copy, numpy work of some ten microseconds, runs on the publisher thread
(``poll``). Where there is no slot, the copies are not launched and the messages are counted as dropped.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sidestep.protocol.messages import Kind, Message
from sidestep.trainer_hooks.accounts import Skip
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.courtesy import give_way
from sidestep.trainer_hooks.pinned_ring import PinnedRing, Slot, is_capturing

Arrays: TypeAlias = dict[str, NDArray[Any]]
Finish: TypeAlias = Callable[[Arrays], Sequence[Message]]

_MAX_HOST_BYTES = 64 << 20
_MAX_ENTRIES = 256


@dataclass(slots=True, eq=False)
class Entry:
    """Copies on their way, and what becomes of them."""

    arrays: Arrays
    slot: Slot | None
    finish: Finish
    kinds: tuple[Kind, ...]
    step: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingStatistics:
    """What staging did so far."""

    num_staged: int
    """Calls of ``stage`` that returned True."""
    num_skipped: int
    """Calls of ``stage`` that returned False."""
    num_finish_errors: int
    """Exceptions that a ``finish`` raised."""
    num_pending: int
    """Entries that are not finished."""
    pinned_bytes: int
    """Page-locked memory held by the ring."""


class Staging:
    """Copies tensors to the host without waiting for them.

    ``stage`` and ``advance`` belong to the training thread, ``poll`` and ``take_skips`` to the publisher thread; the
    two share nothing but deques and counters with one writer each.
    """

    def __init__(
        self, *, num_slots: int = 16, max_host_bytes: int = _MAX_HOST_BYTES, console: Console | None = None
    ) -> None:
        """Hold at most ``num_slots`` unfinished copies from a device, and ``max_host_bytes`` of copies altogether.

        Raises:
            ValueError: one of them is not positive.
        """
        if max_host_bytes <= 0:
            raise ValueError(f"max_host_bytes is {max_host_bytes}; it must be positive")
        self._console = console or Console()
        self._ring = PinnedRing(num_slots=num_slots, max_bytes=max_host_bytes)
        self._max_host_bytes = max_host_bytes
        self._copying: deque[Entry] = deque()
        self._ready: deque[Entry] = deque()
        self._skips: deque[Skip] = deque()
        self._staged_bytes = self._finished_bytes = 0  # each has one writer: the training and the publisher thread
        self._num_staged = self._num_finished = self._num_skipped = self._num_finish_errors = 0

    # ------------------------------------------------------------------------------------- the training thread

    def stage(
        self,
        tensors: Mapping[str, torch.Tensor],
        finish: Finish,
        *,
        kinds: Sequence[Kind] = (),
        step: int = -1,
        owned: bool = False,
        held_bytes: int = 0,
    ) -> bool:
        """Copy ``tensors`` to the host and let ``finish`` make messages of them, later, on another thread.

        Args:
            tensors: Any devices and shapes; bfloat16 arrives as float32. None of them is kept alive.
            finish: Gets name to array (its own, to keep) and returns messages; it must not touch a tensor.
            kinds: The messages that ``finish`` is going to make, one entry each: what is counted when it does not.
            step: The step of those messages.
            owned: True where CPU tensors are nobody else's: they are not copied.
            held_bytes: Host memory that ``finish`` itself holds until it is called.

        Returns:
            False where there is no room, a graph is being captured, or a tensor is on a device other than CPU and
            CUDA; the messages are then counted as dropped.
        """
        self.advance()
        entry = self._launch(tensors, finish, tuple(kinds), step, owned=owned, held_bytes=held_bytes)
        if entry is None:
            self._num_skipped += 1
            self._skips.extend(Skip(kind, step, announced=False) for kind in kinds)
            return False
        self._num_staged += 1
        self._staged_bytes += entry.size_bytes
        (self._ready if entry.slot is None else self._copying).append(entry)
        return True

    def advance(self) -> None:
        """Pass copies that are done on to the publisher thread; cheap, and nothing while a graph is captured."""
        if not self._copying or is_capturing():
            return
        while self._copying and self._is_done(self._copying[0]):
            self._ready.append(self._copying.popleft())

    @property
    def num_pending(self) -> int:
        """Entries that are not finished."""
        return self._num_staged - self._num_finished

    def statistics(self) -> StagingStatistics:
        """Return what was done so far."""
        return StagingStatistics(
            num_staged=self._num_staged,
            num_skipped=self._num_skipped,
            num_finish_errors=self._num_finish_errors,
            num_pending=self.num_pending,
            pinned_bytes=self._ring.size_bytes,
        )

    def _launch(
        self,
        tensors: Mapping[str, torch.Tensor],
        finish: Finish,
        kinds: tuple[Kind, ...],
        step: int,
        *,
        owned: bool,
        held_bytes: int,
    ) -> Entry | None:
        device: dict[str, torch.Tensor] = {}
        size_bytes = held_bytes
        for name, tensor in tensors.items():  # one plain loop: among cold caches each line of it counts
            size_bytes += tensor.nbytes
            if tensor.is_cuda:
                device[name] = tensor.detach()
            elif not tensor.is_cpu:
                return None  # neither the CPU's nor CUDA's: there is no way that is known not to wait
        if not self._has_room(size_bytes):
            return None
        slot = None
        if device:
            slot = self._ring.copy(device)
            if slot is None:
                return None
        arrays = {name: _to_array(tensor, owned=owned) for name, tensor in tensors.items() if name not in device}
        return Entry(arrays, slot, finish, kinds, step, size_bytes)

    def _has_room(self, size_bytes: int) -> bool:
        if self._num_staged - self._num_finished >= _MAX_ENTRIES:
            return False
        return self._staged_bytes - self._finished_bytes + size_bytes <= self._max_host_bytes

    @staticmethod
    def _is_done(entry: Entry) -> bool:
        return entry.slot is None or entry.slot.is_done()

    # ------------------------------------------------------------------------------------- the publisher thread

    def poll(self) -> list[Message]:
        """Finish what is ready and return its messages; never waits."""
        messages: list[Message] = []
        while self._ready:
            give_way()
            entry = self._ready.popleft()
            made = self._finish(entry)
            messages += made
            missing = Counter(entry.kinds) - Counter(message.kind for message in made)
            self._skips.extend(Skip(kind, entry.step, announced=True) for kind in missing.elements())
            self._finished_bytes += entry.size_bytes
            self._num_finished += 1
        return messages

    def take_skips(self) -> list[Skip]:
        """Return the messages that never came to be since the last call."""
        return [self._skips.popleft() for _ in range(len(self._skips))]

    def _finish(self, entry: Entry) -> Sequence[Message]:
        try:
            arrays = entry.arrays
            if entry.slot is not None:
                arrays |= self._ring.read(entry.slot)
            return list(entry.finish(arrays))
        except Exception as error:  # noqa: BLE001  (a metric that fails is counted and said; training goes on)
            self._num_finish_errors += 1
            self._console.once("finish", f"a measurement failed and is dropped ({error!r}); more of these are counted.")
            return []


def _to_array(tensor: torch.Tensor, *, owned: bool) -> NDArray[Any]:
    """Return a CPU tensor as an array of its own; trainers change theirs in place."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.float().numpy()
    array: NDArray[Any] = tensor.numpy()
    return array if owned else array.copy()


def arrays_below(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """Return the arrays whose names begin with a prefix, under the rest of their names."""
    size = len(prefix)
    return {name[size:]: np.asarray(array) for name, array in arrays.items() if name.startswith(prefix)}
