"""What leaves the worker: entries that are written once, in the transaction that closes a step, and never change.

A sink sends outbox entries and nothing else, so what it sends after a restart is the same bytes (docs/delivery.md,
sections 3 and 4). Payloads are canonical JSON: equal values are equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

EntryKind: TypeAlias = Literal["run", "row", "table", "alert", "notice", "finish"]
"""``run`` opens a run and is its first entry; ``row`` and ``table`` are one ``run.log`` each; ``alert`` and ``notice``
are for people; ``finish`` ends an attempt."""

NUMBERED_KINDS: Final = frozenset({"row", "table"})
"""Kinds that a W&B run counts: row number k is W&B's ``_step`` k."""


_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxEntry:
    """One entry as it is stored; its position is given when it is written."""

    kind: EntryKind
    payload: bytes
    """Canonical JSON (``canonical``)."""
    row_number: int | None = None
    """0, 1, 2, ... over the run's rows and tables together; None for the other kinds.

    A projection leaves it None; the journal numbers rows and tables as it writes them."""

    def value(self) -> dict[str, Any]:
        """Return the payload as a map; raises ValueError where the bytes are not JSON."""
        return decoded(self.payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEntry:
    """An entry with its place in the run's outbox."""

    run_id: str
    position: int
    """0, 1, 2, ... over all entries of the run, gapless."""
    kind: EntryKind
    row_number: int | None
    payload: bytes

    def value(self) -> dict[str, Any]:
        """Return the payload as a map; raises ValueError where the bytes are not JSON."""
        return decoded(self.payload)


def canonical(value: Mapping[str, Any]) -> bytes:
    """Encode a payload so that equal values give equal bytes.

    Raises ValueError for NaN and infinities (what is absent is left out), TypeError for what JSON cannot say.
    """
    return _ENCODER.encode(value).encode("utf-8", "backslashreplace")


def decoded(payload: bytes) -> dict[str, Any]:
    """Return a payload as a map; raises ValueError where the bytes are not JSON."""
    value: dict[str, Any] = json.loads(payload)
    return value


def entry(kind: EntryKind, value: Mapping[str, Any]) -> OutboxEntry:
    """Make an entry of a payload; raises as ``canonical`` does."""
    return OutboxEntry(kind=kind, payload=canonical(value))
