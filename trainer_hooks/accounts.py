"""What became of every message, per kind (docs/delivery.md, section 6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sidestep.protocol.messages import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class KindAccount:
    """The account of one kind; ``produced == accepted + refused + dropped + in_window`` always."""

    produced: int
    """Messages handed over, those dropped before they were one (staging skips) included."""
    accepted: int
    """Messages that the worker's journal holds."""
    refused: int
    """Messages that the worker will never store."""
    dropped: int
    """Messages given up on this side."""
    in_window: int
    """Messages still here: unsent, or sent and not yet acked."""


@dataclass(frozen=True, slots=True)
class Skip:
    """One message that never came to be."""

    kind: Kind
    step: int
    announced: bool
    """True where the step's ``StepEnd`` counts it as sent, so that it must be corrected."""


class Accounts:
    """Cumulative counts per kind; written by the publisher thread alone."""

    def __init__(self) -> None:
        """Start at zero."""
        self._produced: Counter[Kind] = Counter()
        self._accepted: Counter[Kind] = Counter()
        self._refused: Counter[Kind] = Counter()
        self._dropped: Counter[Kind] = Counter()

    def produce(self, kind: Kind) -> None:
        """Count a message that came in."""
        self._produced[kind] += 1

    def accept(self, kind: Kind) -> None:
        """Count a message that was acked."""
        self._accepted[kind] += 1

    def refuse(self, kind: Kind) -> None:
        """Count a message that the worker refused."""
        self._refused[kind] += 1

    def drop(self, kind: Kind, count: int = 1) -> None:
        """Count messages that were given up."""
        self._dropped[kind] += count

    @property
    def num_dropped(self) -> int:
        """Messages of all kinds that were given up."""
        return self._dropped.total()

    def head(self) -> dict[str, tuple[int, int, int]]:
        """Return kind's name to (produced, dropped, refused), as an envelope carries it."""
        return {
            kind.name.lower(): (produced, self._dropped[kind], self._refused[kind])
            for kind, produced in self._produced.items()
        }

    def snapshot(self, in_window: Mapping[Kind, int]) -> dict[Kind, KindAccount]:
        """Return the account of every kind seen; ``in_window`` is counted by those who hold the messages."""
        return {
            kind: KindAccount(
                produced=produced,
                accepted=self._accepted[kind],
                refused=self._refused[kind],
                dropped=self._dropped[kind],
                in_window=in_window.get(kind, 0),
            )
            for kind, produced in self._produced.items()
        }
