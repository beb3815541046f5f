"""What a family's measurement of one step is, and how a value gets into it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Message, Notice
from sidestep.worker.records import Part, RunContext

Value: TypeAlias = float | int | str | dict[str, Any]
"""A number, a text, or a histogram (``histogram``)."""

MAX_HISTOGRAM_BINS = 512
"""Most bins of a histogram that W&B takes."""

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table of one step; its cells are numbers, texts and images."""

    key: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(slots=True, kw_only=True)
class Measurement:
    """Values and tables of one family at one step; what could not be measured is not in them."""

    values: dict[str, Value] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    """Each with a code: shown once a run."""
    malformed_parts: int = 0
    """Parts left out because their arrays contradict each other or the run's tables."""

    def put(self, key: str, value: float | None) -> None:
        """Set a number; None and what is not finite stay absent."""
        if value is not None and math.isfinite(value):
            self.values[key] = value

    def put_ratio(self, key: str, numerator: float, denominator: float) -> None:
        """Set ``numerator / denominator``; absent where the denominator is 0."""
        if denominator:
            self.put(key, numerator / denominator)

    def add(self, other: Measurement) -> None:
        """Take in what another measurement of the same step found."""
        self.values.update(other.values)
        self.tables.extend(other.tables)
        self.notices.extend(other.notices)
        self.malformed_parts += other.malformed_parts


def messages_of(parts: Sequence[Part], kind: type[M]) -> list[tuple[int, M]]:
    """Return (rank, message) of the parts that hold a message of type ``kind``."""
    return [(part.rank, part.message) for part in parts if isinstance(part.message, kind)]


def distinct_batches(parts: Sequence[Part], context: RunContext) -> list[Part]:
    """Return the parts with tensor-parallel copies left out.

    Ranks with the same ``data_parallel_rank`` see the same batch; the lowest of them that sent anything counts
    (docs/metrics.md, "All ranks").
    """
    speaker: dict[int, int] = {}
    for part in parts:
        place = _data_parallel_rank(part.rank, context)
        speaker[place] = min(part.rank, speaker.get(place, part.rank))
    return [part for part in parts if speaker[_data_parallel_rank(part.rank, context)] == part.rank]


def copies(ranks: Iterable[int], context: RunContext) -> set[int]:
    """Return which of ``ranks`` see the same batches as a lower rank of the run, whether or not that one is among them.

    For what comes one by one and must count once.
    """
    lowest: dict[int, int] = {}
    for rank in context.topologies:
        place = _data_parallel_rank(rank, context)
        lowest[place] = min(rank, lowest.get(place, rank))
    return {rank for rank in ranks if lowest.get(_data_parallel_rank(rank, context), rank) < rank}


def _data_parallel_rank(rank: int, context: RunContext) -> int:
    place = context.topologies.get(rank, {}).get("data_parallel_rank", rank)
    return place if isinstance(place, int) else rank


def same_length(*arrays: NDArray[Any]) -> bool:
    """Whether all arrays have one axis of the same length."""
    return len({array.shape for array in arrays}) == 1 and arrays[0].ndim == 1


def histogram(counts: Sequence[int] | NDArray[np.int64], edges: Sequence[float] | NDArray[np.float64]) -> Value:
    """Return a histogram as a row holds it: n counts, n + 1 edges."""
    return {"_type": "histogram", "counts": [int(c) for c in counts], "edges": [float(e) for e in edges]}


def length_histogram(counts: Mapping[int, int]) -> Value:
    """Return a histogram of whole numbers: a bin each, or equal wider bins where that makes more than 512.

    Edges lie half-way between lengths, so that no length stands on one.
    """
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // MAX_HISTOGRAM_BINS)
    num_bins = -(-(high - low + 1) // width)
    binned = [0] * num_bins
    for length, count in counts.items():
        binned[(length - low) // width] += count
    return histogram(binned, [low - 0.5 + width * i for i in range(num_bins + 1)])


def notice_once(code: str, text: str, step: int, level: str = "warning") -> Notice:
    """Return a notice that is shown the first time its code comes up in a run."""
    return Notice(text=text, code=code, level=level, step=step)


def most_common(ids: Iterable[int], counts: Iterable[int]) -> tuple[int, int] | None:
    """Return (id, count) of the largest count, the smallest id among equals; None where all counts are 0."""
    best = max(zip(counts, ids, strict=True), key=lambda pair: (pair[0], -pair[1]), default=None)
    return (int(best[1]), int(best[0])) if best is not None and best[0] > 0 else None
