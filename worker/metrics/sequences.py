"""Generated and target sequences, cut at their first EOS: what ``generation/`` and ``collapse/`` speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sidestep.protocol.messages import Generation, Json
from sidestep.worker.metrics.measurement import messages_of
from sidestep.worker.records import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """Ids before the first EOS, and whether there was one."""

    content: tuple[int, ...]
    has_ended: bool

    @classmethod
    def cut(cls, ids: Sequence[int], eos_id: int | None) -> TokenSequence:
        """Cut ``ids`` at the first ``eos_id``: what a model fills in after it is nobody's answer."""
        plain = tuple(map(int, ids))
        if eos_id is None or eos_id not in plain:
            return cls(content=plain, has_ended=False)
        return cls(content=plain[: plain.index(eos_id)], has_ended=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSamples:
    """All samples generated at one step, over all ranks, each once."""

    samples: tuple[int, ...]
    """Rows of the table ``samples``, ascending [n]."""
    sequences: tuple[TokenSequence, ...]
    """What was generated from each [n]."""
    failed: tuple[int, ...] = ()
    """Rows whose generation raised on every rank that tried."""
    failures: tuple[str, ...] = ()
    max_new_tokens: int = 64
    seconds: float = 0.0
    malformed_parts: int = 0


def read_generated(parts: Sequence[Part], eos_id: int | None) -> GeneratedSamples | None:
    """Join the ``Generation`` of all ranks, each sample once; None where there is none."""
    received = messages_of(parts, Generation)
    sound = [message for _, message in received if _is_sound(message)]
    if not received:
        return None
    sequences: dict[int, TokenSequence] = {}
    for message in sound:
        for place, row in enumerate(message.samples.tolist()):
            ids = message.ids[int(message.offsets[place]) : int(message.offsets[place + 1])]
            sequences.setdefault(row, TokenSequence.cut(ids.tolist(), eos_id))
    return GeneratedSamples(
        samples=tuple(sorted(sequences)),
        sequences=tuple(sequences[row] for row in sorted(sequences)),
        failed=tuple(sorted({row for message in sound for row in message.failed.tolist()} - sequences.keys())),
        failures=tuple(dict.fromkeys(text for message in sound for text in message.failures)),
        max_new_tokens=max((message.max_new_tokens for message in sound), default=0),
        seconds=max((message.seconds for message in sound), default=0.0),
        malformed_parts=len(received) - len(sound),
    )


def _is_sound(message: Generation) -> bool:
    """An offset for each sample and one more, ascending from 0 to the end of the ids."""
    offsets = message.offsets
    if message.ids.ndim != 1 or offsets.shape != (message.samples.size + 1,):
        return False
    return bool(offsets[0] == 0 and offsets[-1] == message.ids.size and (np.diff(offsets) >= 0).all())


def sample_row(samples: Mapping[str, Json], row: int) -> Mapping[str, Json]:
    """Return a row of the table ``samples``; empty where there is no such row."""
    rows = samples.get("samples")
    found = rows[row] if isinstance(rows, list | tuple) and 0 <= row < len(rows) else {}
    return found if isinstance(found, Mapping) else {}


def target_sequences(samples: Mapping[str, Json], rows: Sequence[int], eos_id: int | None) -> tuple[TokenSequence, ...]:
    """Return the targets of these rows, cut the same way; rows without target ids are left out."""
    found: list[TokenSequence] = []
    for row in rows:
        ids = sample_row(samples, row).get("target_ids")
        if isinstance(ids, list | tuple) and ids and all(isinstance(i, int) for i in ids):
            found.append(TokenSequence.cut(ids, eos_id))
    return tuple(found)
