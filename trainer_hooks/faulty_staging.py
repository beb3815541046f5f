"""Staging on which faults strike (the points ``trainer.stage`` and ``trainer.finish`` of ``faults``)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from sidestep.protocol.faults import Action, Faults, InjectedFaultError
from sidestep.protocol.messages import Kind, Message
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.faults import FINISH, POINTS, STAGE
from sidestep.trainer_hooks.pinned_ring import Slot
from sidestep.trainer_hooks.staging import Arrays, Entry, Finish, Staging


class _DelayedSlot(Slot):
    """A copy that says it is done some time after it is."""

    def __init__(self, inner: Slot | None, until: float) -> None:
        self.inner = inner
        self._until = until

    def is_done(self) -> bool:
        """Return whether its time has come, and the copy is done."""
        return time.monotonic() >= self._until and (self.inner is None or self.inner.is_done())


class FaultyStaging(Staging):
    """Staging whose copies fail, are refused for want of room, or are done late."""

    def __init__(self, faults: Faults, *, rank: int, max_host_bytes: int, console: Console) -> None:
        faults.check_points("trainer", POINTS)
        super().__init__(max_host_bytes=max_host_bytes, console=console)
        self._faults = faults
        self._rank = rank

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
        names = [kind.name.lower() for kind in kinds] or [""]
        struck = (self._faults.strike(STAGE, rank=self._rank, step=step, kind=name) for name in names)
        fault = next(filter(None, struck), None)
        action = None if fault is None else fault.action
        if action is Action.FAIL:
            raise InjectedFaultError(f"{STAGE} fails on purpose")
        if action is Action.DROP:
            return None

        def finish_or_fail(arrays: Arrays) -> Sequence[Message]:
            dropped = [self._faults.act(FINISH, rank=self._rank, step=step, kind=name) for name in names]
            return [] if any(dropped) else finish(arrays)

        entry = super()._launch(tensors, finish_or_fail, kinds, step, owned=owned, held_bytes=held_bytes)
        if entry is not None and fault is not None and action is Action.DELAY:
            entry.slot = _DelayedSlot(entry.slot, time.monotonic() + fault.seconds)
        return entry

    def _finish(self, entry: Entry) -> Sequence[Message]:
        if isinstance(entry.slot, _DelayedSlot):
            entry.slot = entry.slot.inner
        return super()._finish(entry)


def make_staging(faults: Faults | None, *, rank: int, max_host_bytes: int, console: Console) -> Staging:
    """Return staging, with faults only where there is a plan.

    Raises:
        ValueError: the plan names a point that there is not.
    """
    if faults is None:
        return Staging(max_host_bytes=max_host_bytes, console=console)
    return FaultyStaging(faults, rank=rank, max_host_bytes=max_host_bytes, console=console)
