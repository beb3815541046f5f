"""Messages as they were journaled, and the one way in which a closing and its messages become a step.

Live and replay use the same function on the same inputs, so a replayed step is the step that was seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from sidestep.protocol.errors import ProtocolError
from sidestep.protocol.frames import Envelope, UnknownMessage, decode
from sidestep.protocol.messages import STEP_KINDS, Goodbye, Kind, Message, Notice, StepEnd
from sidestep.protocol.version import WIRE_MINOR
from sidestep.worker.errors import JournalError
from sidestep.worker.intake.segments import Row
from sidestep.worker.records import AssembledStep, Part, RankAccount, StepClosing

ACCOUNTS_MINOR: Final = 1
"""Rows of what an older wire brought say no more of their accounts than they did: their replay is the same bytes."""

Key: TypeAlias = tuple[int, int]
"""(rank, sequence) within one incarnation."""


class Journaled(NamedTuple):
    """One message that is on disk."""

    envelope: Envelope
    message: Message | UnknownMessage
    arrival: int = -1
    """Number over all messages of the journal, in the order they were committed; -1 until it is on disk."""
    received_at: float = 0.0
    """The worker's clock when it came, unix seconds."""
    wire_minor: int = WIRE_MINOR
    """Minor version of the wire that its publisher speaks."""

    @property
    def key(self) -> Key:
        """(rank, sequence)."""
        return self.envelope.rank, self.envelope.sequence

    def part(self) -> Part:
        """Return it as a part of a step; raises TypeError for a kind that this version does not know."""
        if isinstance(self.message, UnknownMessage):
            raise TypeError(f"a message of the unknown kind {self.message.kind} is no part of a step")
        return Part(
            rank=self.envelope.rank,
            message=self.message,
            incarnation=self.envelope.incarnation,
            sequence=self.envelope.sequence,
            received_at=self.received_at,
        )


def journaled(row: Row) -> Journaled:
    """Decode a stored message.

    Raises:
        JournalError: what the journal holds is no message of this version.
    """
    try:
        envelope, message = decode(row.body)
    except ProtocolError as error:
        raise JournalError(
            f"message {row.sequence} of rank {row.rank} of {row.incarnation} cannot be read: {error}"
        ) from error
    return Journaled(
        envelope=envelope, message=message, arrival=row.arrival, received_at=row.received_at, wire_minor=row.wire_minor
    )


def step_of(message: Message | UnknownMessage) -> int:
    """Return the step that a message belongs to, -1 for kinds without one."""
    step = getattr(message, "step", -1)
    return step if isinstance(step, int) else -1


def assemble(closing: StepClosing, messages: Mapping[Key, Journaled]) -> AssembledStep:
    """Return the step that ``closing`` closed, from its messages and the late ones it counts.

    Raises:
        JournalError: a message that the closing names is not among ``messages``.
    """
    keys = (*closing.parts, *closing.late_parts)
    missing = [key for key in keys if key not in messages]
    if missing:
        raise JournalError(f"step {closing.step} of run {closing.run_id} used messages that are gone: {missing[:5]}")
    own = [messages[key] for key in sorted(closing.parts)]
    ends = _newest_ends(own)
    parts: dict[Kind, list[Part]] = {}
    for each in own:
        if not isinstance(each.message, UnknownMessage) and each.message.kind in STEP_KINDS:
            parts.setdefault(each.message.kind, []).append(each.part())
    unix_time = max((end.unix_time for _, end in ends.values()), default=0.0)
    newest = max((each.received_at for each in own), default=0.0)
    return AssembledStep(
        run_id=closing.run_id,
        attempt=closing.attempt,
        step=closing.step,
        reason=closing.reason,
        parts={kind: tuple(parts[kind]) for kind in STEP_KINDS if kind in parts},
        ends={rank: end for rank, (_, end) in ends.items()},
        ranks_expected=closing.ranks_expected,
        ranks_seen=len(ends),
        late_parts=tuple(messages[key].part() for key in sorted(closing.late_parts)),
        notices=tuple(each.message for each in own if isinstance(each.message, Notice)),
        unix_time=unix_time if ends else _latest(closing, messages),
        lag_seconds=max(0.0, newest - unix_time) if ends else 0.0,
        accounts=_newest_accounts(messages[key].envelope for key in keys),
        num_messages=_num_messages([messages[key] for key in keys]),
    )


def _latest(closing: StepClosing, messages: Mapping[Key, Journaled]) -> float:
    keys = (*closing.parts, *closing.late_parts)
    return max((messages[key].received_at for key in keys), default=0.0)


def _newest_ends(messages: Sequence[Journaled]) -> dict[int, tuple[Envelope, StepEnd]]:
    """``messages`` are in the order of (rank, sequence), so the last one of a rank is its newest."""
    return {each.envelope.rank: (each.envelope, each.message) for each in messages if isinstance(each.message, StepEnd)}


def _num_messages(messages: Sequence[Journaled]) -> int | None:
    if any(each.wire_minor < ACCOUNTS_MINOR for each in messages):
        return None
    return sum(not isinstance(each.message, Goodbye) for each in messages)


def _newest_accounts(envelopes: Iterable[Envelope]) -> dict[int, RankAccount]:
    newest: dict[int, Envelope] = {}
    for envelope in envelopes:
        known = newest.get(envelope.rank)
        if envelope.accounts and (known is None or known.sequence < envelope.sequence):
            newest[envelope.rank] = envelope
    return {
        rank: RankAccount(kinds=envelope.accounts, resent=envelope.resent) for rank, envelope in sorted(newest.items())
    }
