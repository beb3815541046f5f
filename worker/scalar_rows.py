"""What the trainer itself logs, as rows of the run: its own names, against its own step axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sidestep.protocol.messages import Json, Scalars
from sidestep.worker.metrics.measurement import Value
from sidestep.worker.records import Part
from sidestep.worker.scalar_reduction import spoken_scalars
from sidestep.worker.text.clipping import clip

AXES_KEY: Final = "_axes"
"""A row's map of key to the step axis that it stands against, for keys with an axis of their own."""

RESERVED_KEYS: Final = frozenset({"_timestamp", "_step", "_runtime", AXES_KEY, "train/step", "train/attempt"})
"""Keys that a row has of its own: a trainer's value of that name is left out and counted."""

MAX_KEY_BYTES: Final = 512
MAX_EXACT_INTEGER: Final = 1 << 53
_MAX_DEPTH: Final = 8


@dataclass(slots=True, kw_only=True)
class ScalarRows:
    """The logged values of one step: the first row is the step's own, further ones hold what would overwrite it."""

    rows: list[dict[str, Value]] = field(default_factory=lambda: [{}])
    num_nonfinite: int = 0
    """Values that are NaN or infinite: absent from the rows."""
    num_left_out: int = 0
    """Values that are neither numbers nor texts, or whose names are reserved."""


def scalar_rows(parts: Sequence[Part], taken: Mapping[str, Value]) -> ScalarRows:
    """Lay out the ``Scalars`` of a step beside the values that its row has already.

    Where ranks log the same name the lowest rank's stands, unless they asked for a reduction. A name that was logged
    twice in one step, or against two values of its axis, goes on in a row of its own, so that nothing is overwritten.
    """
    laid = ScalarRows()
    speakers: dict[str, int] = {}
    for rank, message in spoken_scalars(parts):
        values = {key: value for key, value in _usable(message, laid).items() if speakers.setdefault(key, rank) == rank}
        if not values:
            continue
        if message.step_key and message.step_key not in RESERVED_KEYS:
            values[message.step_key] = message.key_step
        row = laid.rows[-1]
        present = {**taken, **row} if len(laid.rows) == 1 else row
        if any(present.get(key, value) != value for key, value in values.items()) or _repeats(values, row, message):
            row = {}
            laid.rows.append(row)
        row.update(values)
        _set_axes(row, values, message.step_key)
    return laid


def _repeats(values: Mapping[str, Value], row: Mapping[str, Value], message: Scalars) -> bool:
    """Whether a name was logged before: the same value twice is two points as well."""
    return any(key in row for key in values if key != message.step_key)


def _set_axes(row: dict[str, Value], values: Mapping[str, Value], axis: str) -> None:
    if axis and axis in values:
        known = row.get(AXES_KEY)
        mine = {key: axis for key in values if key != axis}
        row[AXES_KEY] = {**known, **mine} if isinstance(known, dict) else mine


def _usable(message: Scalars, laid: ScalarRows) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for key, raw in _flattened(message.values, ""):
        value = _plain(raw)
        if isinstance(value, float) and not math.isfinite(value):
            laid.num_nonfinite += 1
        elif value is None or key in RESERVED_KEYS or len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
            laid.num_left_out += 1
        else:
            values[key] = value
    return values


def _flattened(values: Mapping[str, Json], prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield (name, value); a map's names are joined by dots, as W&B does it."""
    for key, value in values.items():
        if isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _flattened(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _plain(value: Json) -> float | int | str | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if abs(value) <= MAX_EXACT_INTEGER else _as_float(value)
    if isinstance(value, str):
        return clip(value)
    return value if isinstance(value, float) else None


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
