"""What every sink is to the worker's loop: something that is given outbox entries, in order, and counts what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from sidestep.worker.outbox import StoredEntry


@runtime_checkable
class Sink(Protocol):
    """A projection of the outbox that runs within the worker's loop.

    A sink that may block (W&B) is no ``Sink``: it is a child process with a supervisor (wandb_supervisor.py).
    """

    @property
    def name(self) -> str:
        """Short name, under which the sink's mark and statistics stand."""

    def take(self, entries: Sequence[StoredEntry]) -> None:
        """Show entries, ascending by position; never raises for what the sink itself cannot write."""

    def statistics(self) -> Mapping[str, int]:
        """Return exact counts since the start."""

    def close(self) -> None:
        """Let go of what the sink holds; may be called twice."""
