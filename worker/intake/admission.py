"""Who may open a stream, and how much a stream may ask for: the bounds that no peer of a worker can go over.

They are far above what a training job needs. Whoever goes over one is told so once and is not listened to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from sidestep.protocol.frames import Envelope
from sidestep.protocol.limits import MAX_RANKS, MAX_TABLES
from sidestep.protocol.messages import Hello
from sidestep.worker.intake.decisions import Incarnation

MAX_INCARNATIONS: Final = 4_096
"""Attempts, over all runs, that one journal holds."""
MAX_STREAMS: Final = 262_144
"""(incarnation, rank) whose Hello one journal holds."""
MAX_HOLES: Final = 4_096
"""Ranges into which a stream's numbers may be torn; a number that tears it further is refused."""
MAX_STRANGER_BYTES: Final = 8 << 20
"""What a connection may send in chunks before its incarnation is known: a Hello of the largest head and its frame."""
MAX_RUN_ID_BYTES: Final = 128
"""It is part of the names of files."""
MESSAGE_OVERHEAD_BYTES: Final = 2_048
"""What a decoded message takes in memory beside its frame, at most: its envelope, fields, arrays and row."""

_ANOTHER: Final = "start a worker with another journal"
_RUN_ID: Final = re.compile(r"[^\x00-\x20\x7f/\\#?%:.][^\x00-\x1f\x7f/\\#?%:]*\Z")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}\Z")


def why_not(envelope: Envelope, hello: Hello, known: Mapping[str, Incarnation], num_streams: int) -> str:
    """Return why the stream of this Hello cannot be opened; empty where it can.

    Args:
        envelope: what it came in.
        hello: what it says.
        known: the incarnations of the journal, by name.
        num_streams: the streams that are open already.
    """
    made = known.get(envelope.incarnation)
    world_size = max(1, hello.world_size)
    is_named = _RUN_ID.match(envelope.run_id) is not None and len(envelope.run_id.encode()) <= MAX_RUN_ID_BYTES
    are_tables = len(hello.tables) <= MAX_TABLES and all(map(_DIGEST.match, hello.tables.values()))
    for is_so, reason in (
        (not is_named, f"a run id names files: at most {MAX_RUN_ID_BYTES} bytes, none of / \\ # ? % :, no dot first"),
        (not envelope.incarnation, "the incarnation has no name"),
        (made is not None and made.run_id != envelope.run_id, "the incarnation belongs to another run"),
        (world_size > MAX_RANKS, f"a world of {world_size} ranks is over the limit of {MAX_RANKS}"),
        (envelope.rank >= (world_size if made is None else made.world_size), "the rank is not within its world's size"),
        (not are_tables, f"the tables are not at most {MAX_TABLES} SHA-256 digests"),
        (
            made is None and len(known) >= MAX_INCARNATIONS,
            f"this journal holds {MAX_INCARNATIONS} attempts: {_ANOTHER}",
        ),
        (num_streams >= MAX_STREAMS, f"this journal holds {MAX_STREAMS} streams: {_ANOTHER}"),
    ):
        if is_so:
            return reason
    return ""


def is_within(envelope: Envelope, known: Mapping[str, Incarnation]) -> bool:
    """Return whether a message's stream is one that its incarnation can have."""
    made = known.get(envelope.incarnation)
    return made is not None and made.run_id == envelope.run_id and envelope.rank < made.world_size
