"""Messages as they were journaled, and the one way in which a closing and its messages become a step.

Live and replay use the same function on the same inputs, so a replayed step is the step that was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

_STEP_KINDS: Final = frozenset(STEP_KINDS)

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
        _, incarnation, rank, sequence, _, _ = self.envelope
        return Part(rank, self.message, incarnation, sequence, self.received_at)


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
    late = [messages[key] for key in sorted(closing.late_parts)]
    ends: dict[int, StepEnd] = {}
    parts: dict[Kind, list[Part]] = {}
    for each in own:  # in the order of (rank, sequence), so the last one of a rank is its newest
        message = each.message
        if isinstance(message, StepEnd):
            ends[each.envelope.rank] = message
        elif message.kind in _STEP_KINDS and not isinstance(message, UnknownMessage):
            parts.setdefault(message.kind, []).append(each.part())
    unix_time = max([end.unix_time for end in ends.values()], default=0.0)
    newest = max([each.received_at for each in own], default=0.0)
    return AssembledStep(
        run_id=closing.run_id,
        attempt=closing.attempt,
        step=closing.step,
        reason=closing.reason,
        parts={kind: tuple(parts[kind]) for kind in STEP_KINDS if kind in parts},
        ends=ends,
        ranks_expected=closing.ranks_expected,
        ranks_seen=len(ends),
        late_parts=tuple([each.part() for each in late]),
        notices=tuple([each.message for each in own if isinstance(each.message, Notice)]),
        unix_time=unix_time if ends else max([each.received_at for each in (*own, *late)], default=0.0),
        lag_seconds=max(0.0, newest - unix_time) if ends else 0.0,
        accounts=_newest_accounts((*own, *late)),
        num_messages=_num_messages((*own, *late)),
    )


def _num_messages(messages: Sequence[Journaled]) -> int | None:
    if messages and min([each.wire_minor for each in messages]) < ACCOUNTS_MINOR:
        return None
    return sum([not isinstance(each.message, Goodbye) for each in messages])


def _newest_accounts(messages: Sequence[Journaled]) -> dict[int, RankAccount]:
    newest: dict[int, Envelope] = {}
    for envelope in [each.envelope for each in messages]:
        known = newest.get(envelope.rank)
        if envelope.accounts and (known is None or known.sequence < envelope.sequence):
            newest[envelope.rank] = envelope
    return {rank: RankAccount(newest[rank].accounts, newest[rank].resent) for rank in sorted(newest)}
