"""From the Hellos and tables of an incarnation to what its projection is made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidestep.protocol.errors import DecodeError
from sidestep.protocol.frames import decode
from sidestep.protocol.messages import Hello, Json
from sidestep.protocol.tables import decode_table
from sidestep.worker.intake.decisions import ContextRecord, Incarnation
from sidestep.worker.intake.index import Index
from sidestep.worker.records import RunContext
from sidestep.worker.text.detokenizer import Detokenizer


def survey(index: Index, incarnation: Incarnation, revision: int) -> ContextRecord:
    """Return what is known of an incarnation now: whose Hellos are here, and which of their tables are not."""
    hellos = read_hellos(index, incarnation.incarnation)
    named = {digest for hello in hellos.values() for digest in hello.tables.values()}
    return ContextRecord(
        run_id=incarnation.run_id,
        attempt=incarnation.attempt,
        revision=revision,
        incarnation=incarnation.incarnation,
        ranks=tuple(sorted(hellos)),
        missing=tuple(sorted(named - index.blob_digests())),
    )


def is_whole(record: ContextRecord, incarnation: Incarnation) -> bool:
    """Return whether every rank's Hello is here, and every table that they name."""
    return len(record.ranks) >= incarnation.world_size and not record.missing


def read_hellos(index: Index, incarnation: str) -> dict[int, Hello]:
    """Return rank to its Hello."""
    hellos = {}
    for rank, body in index.hellos(incarnation).items():
        _, hello = decode(body)
        if isinstance(hello, Hello):
            hellos[rank] = hello
    return hellos


def build_context(index: Index, record: ContextRecord) -> tuple[RunContext, Hello]:
    """Return the context that ``record`` stands for, the same each time, and the Hello that opens the run.

    Tables that were missing stay empty, though they may have come since.
    """
    hellos = {rank: hello for rank, hello in read_hellos(index, record.incarnation).items() if rank in record.ranks}
    first = hellos[min(hellos)] if hellos else Hello()
    decoded: dict[str, Mapping[str, Json]] = {}

    def table(hello: Hello, name: str) -> Mapping[str, Json]:
        digest = hello.tables.get(name, "")
        if digest and digest not in record.missing and digest not in decoded:
            decoded[digest] = _decoded(index.blob(digest))
        return decoded.get(digest, {})

    own = first.tables.get("parameters")
    tokenizer = table(first, "tokenizer")
    context = RunContext(
        run_id=record.run_id,
        attempt=record.attempt,
        text=Detokenizer(tokenizer),
        settings=dict(first.settings),
        world_size=max(1, first.world_size),
        start_step=first.start_step,
        parameters=table(first, "parameters"),
        parameters_by_rank={
            rank: table(hello, "parameters")
            for rank, hello in hellos.items()
            if hello.tables.get("parameters", own) != own
        },
        groups=table(first, "groups"),
        tokenizer={name: value for name, value in tokenizer.items() if name not in {"content", "texts"}},
        samples=table(first, "samples"),
        topologies={rank: dict(hello.topology) for rank, hello in hellos.items()},
        capabilities=dict(first.capabilities),
    )
    return context, first


def _decoded(content: bytes | None) -> Mapping[str, Any]:
    """Decode a table; one that is no map is as good as none: what depends on it is absent from the run."""
    if content is None:
        return {}
    try:
        value = decode_table(content)
    except DecodeError:
        return {}
    return value if isinstance(value, dict) else {}
