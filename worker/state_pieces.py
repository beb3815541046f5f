"""A projection's state in pieces: what did not change is not written again; what is large is not encoded again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sidestep.protocol.messages import Json
from sidestep.protocol.tables import encode_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One piece of a state."""

    name: str
    make: Callable[[], Json]
    """Returns its value, as plain values."""
    revision: int | None = None
    """A number that changes with the value; None: whether it changed is seen by encoding it."""


class ChangedPieces:
    """Knows what was stored of a state."""

    def __init__(self) -> None:
        self._stored: dict[str, int | bytes] = {}

    def take(self, pieces: Iterable[Piece], always: str = "") -> dict[str, bytes]:
        """Return the pieces that are not as they were when they were taken or known last, encoded; ``always`` too."""
        changed = {}
        for piece in pieces:
            known = None if piece.name == always else self._stored.get(piece.name)
            if piece.revision is not None and known == piece.revision:
                continue
            body = encode_table(piece.make())
            if piece.revision is None and known == body:
                continue
            self._stored[piece.name] = body if piece.revision is None else piece.revision
            changed[piece.name] = body
        return changed

    def know(self, pieces: Iterable[Piece], stored: Mapping[str, bytes]) -> None:
        """Take over what is stored of a state that was restored from it."""
        self._stored = {
            piece.name: stored[piece.name] if piece.revision is None else piece.revision
            for piece in pieces
            if piece.name in stored
        }

    def forget(self) -> None:
        """Take everything for changed: another state stands in this one's place."""
        self._stored = {}
