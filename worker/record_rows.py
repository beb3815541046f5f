"""The rows of a step's record: the labelled positions of all ranks, joined, weighted and thinned to a fixed number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Signals
from sidestep.worker.step_record import MAX_ID, MAX_MEAN_IDS, MAX_RECORD_RANKS, MAX_RECORD_ROWS

COLUMNS: Final = ("targets", "losses", "places")
OPTIONAL: Final = ("predictions", "entropies", "eos_probabilities")


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundRows:
    """The rows that can be read, of all ranks that sent readable ones, ranks one after another."""

    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    """Rows of each rank; 0 where none is sound."""
    weights: tuple[float, ...]
    """Labelled positions that a row of each rank stands for."""
    columns: Mapping[str, NDArray[Any]]
    """Each of ``COLUMNS``, and each of ``OPTIONAL`` that all ranks with rows have [n]."""
    nonfinite: int
    """Rows left out because their loss or entropy is no number."""


def sound_rows(signals: Sequence[tuple[int, Signals]]) -> SoundRows:
    """Return the rows that can be read; a rank whose arrays contradict each other, or that has none, is left out."""
    sent = [(rank, message) for rank, message in signals if _is_readable(message)]
    ranks = tuple(rank for rank, _ in sent)
    messages = [message for _, message in sent]
    sizes = [message.targets.size for message in messages]
    weights = tuple(
        max(float(message.labelled), float(size)) / size for message, size in zip(messages, sizes, strict=True)
    )
    if not sent:
        return SoundRows(ranks=ranks, sizes=(), weights=weights, columns={}, nonfinite=0)
    columns = {name: _column(messages, name) for name in (*COLUMNS, *OPTIONAL)}
    finite = np.isfinite(columns["losses"]) & np.isfinite(columns["entropies"])
    kept = finite & (columns["losses"] >= 0)
    for name in ("targets", "predictions"):
        kept &= (columns[name] >= 0) & (columns[name] <= MAX_ID)
    if not kept.all():
        owners = np.repeat(np.arange(len(sizes)), sizes)
        sizes = np.bincount(owners[kept], minlength=len(sizes)).tolist()
        columns = {name: values[kept] for name, values in columns.items()}
    # What one rank lacks nobody has: rows of unequal meaning would be compared.
    with_rows = [message for message, size in zip(messages, sizes, strict=True) if size]
    lacking = {name for name in OPTIONAL if not all(getattr(message, name).size for message in with_rows)}
    return SoundRows(
        ranks=ranks,
        sizes=tuple(sizes),
        weights=weights,
        columns={name: values for name, values in columns.items() if name not in lacking},
        nonfinite=finite.size - int(np.count_nonzero(finite)),
    )


def _is_readable(message: Signals) -> bool:
    shape = message.targets.shape
    if not message.targets.size or len(shape) != 1 or message.losses.shape != shape or message.places.shape != shape:
        return False
    optional = (message.predictions, message.entropies, message.eos_probabilities)
    return all(array.shape == shape or not array.size for array in optional)


def _column(messages: Sequence[Signals], name: str) -> NDArray[Any]:
    """Join an array of all ranks; zeros, which are sound, stand for what a rank does not send."""
    arrays: list[NDArray[Any]] = [getattr(message, name) for message in messages]
    return np.concatenate(
        [
            array if array.size else np.zeros(message.targets.size, array.dtype)
            for array, message in zip(arrays, messages, strict=True)
        ]
    )


def row_facts(rows: SoundRows) -> dict[str, Any]:
    """Return the fields of a record that are made of rows."""
    num_rows = sum(rows.sizes)
    if not num_rows:
        return {"nonfinite_losses": rows.nonfinite}
    ends = np.cumsum(rows.sizes)
    kept = _thinned(_answer_starts(rows.columns["places"], ends, rows.sizes), MAX_RECORD_ROWS)
    ranks, rank_rows = _rank_runs(rows, kept)
    facts: dict[str, Any] = dict(rows.columns)
    if kept is not None:
        facts = {name: values[kept] for name, values in facts.items()}
    total = sum(weight * size for weight, size in zip(rows.weights, rows.sizes, strict=True) if size)
    facts["loss"] = _weighted(rows, "losses", ends.tolist()) / total
    if "entropies" in rows.columns:
        facts["entropy"] = _weighted(rows, "entropies", ends.tolist()) / total
    return {**facts, "ranks": ranks, "rank_rows": rank_rows, "seen_rows": num_rows, "nonfinite_losses": rows.nonfinite}


def _weighted(rows: SoundRows, name: str, ends: Sequence[int]) -> float:
    values = rows.columns[name]
    return sum(
        weight * float(values[end - size : end].sum(dtype=np.float64))
        for weight, size, end in zip(rows.weights, rows.sizes, ends, strict=True)
        if size
    )


def _answer_starts(places: NDArray[np.uint8], ends: NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.bool_]:
    """Return where answers begin; a rank's first row begins one [n]."""
    starts: NDArray[np.bool_] = places == 0
    first = ends - sizes
    starts[first[first < places.size]] = True
    return starts


def _thinned(starts: NDArray[np.bool_], limit: int) -> NDArray[np.int64] | None:
    """Return the rows to keep: those of answers evenly spread, in at most ``limit`` rows; None: all."""
    size = starts.size
    if size <= limit:
        return None
    answers = np.cumsum(starts) - 1
    marks = np.floor(np.arange(int(answers[-1]) + 2) * (limit / size))
    taken = marks[1:] > marks[:-1]
    if not taken.any():
        taken[0] = True
    return np.flatnonzero(taken[answers])[:limit]


def _rank_runs(rows: SoundRows, kept: NDArray[np.int64] | None) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the ranks that have rows, and how many each; ranks beyond the limit are joined under -1."""
    has_rows = [place for place, size in enumerate(rows.sizes) if size]
    ranks = [rows.ranks[place] for place in has_rows]
    numbers = [rows.sizes[place] for place in has_rows]
    if kept is not None:
        owners = np.repeat(np.arange(len(numbers)), numbers)
        numbers = np.bincount(owners[kept], minlength=len(numbers)).tolist()
    if len(ranks) > MAX_RECORD_RANKS:
        ranks = [*ranks[:MAX_RECORD_RANKS], -1]
        numbers = [*numbers[:MAX_RECORD_RANKS], sum(numbers[MAX_RECORD_RANKS:])]
    return np.array(ranks, np.int32), np.array(numbers, np.int32)


def mean_facts(signals: Sequence[Signals], rows: SoundRows) -> dict[str, Any]:
    """Merge the ranks' mean predictions, and count the same ids among the targets of the same rows.

    The targets counted are all that the rank sent, sound or not: the mean prediction is over them too.
    """
    sound: list[Signals] = []
    rests: list[float] = []
    for message in signals:
        rest = _rest(message) if message.targets.ndim == 1 and message.targets.size else None
        if rest is not None:
            sound.append(message)
            rests.append(rest)
    top = [(m.top_probability, m.targets.size) for m in signals if 0 <= m.top_probability <= 1 and m.targets.size]
    facts: dict[str, Any] = {}
    if top:
        facts["top_probability"] = sum(value * size for value, size in top) / sum(size for _, size in top)
    if not sound or len(sound) < len(rows.ranks):
        return facts
    sizes = [message.targets.size for message in sound]
    weights = np.array([max(float(m.labelled), float(m.targets.size)) for m in sound])
    weights /= weights.sum()
    ids, places = np.unique(np.concatenate([m.mean_ids for m in sound]), return_inverse=True)
    values = np.concatenate([m.mean_probabilities for m in sound]).astype(np.float64)
    values *= np.repeat(weights, [m.mean_ids.size for m in sound])
    means = np.bincount(places.reshape(-1), weights=values, minlength=ids.size)
    order = np.lexsort((ids, -means))[:MAX_MEAN_IDS]
    targets = np.concatenate([np.sort(m.targets) for m in sound])  # rows of a rank weigh the same, in any order
    found = np.minimum(ids.searchsorted(targets), ids.size - 1)
    # A row whose target nobody names adds 0 to another's share, which changes nothing.
    row_weights = np.repeat(weights / sizes, sizes) * (ids[found] == targets)
    shares = np.bincount(found, weights=row_weights, minlength=ids.size)[order]
    facts["mean_ids"] = ids[order].astype(np.int32)
    facts["mean_probabilities"] = means[order].astype(np.float32)
    facts["mean_shares"] = shares.astype(np.float32)
    slack = float(np.dot(weights, rests))
    facts["mean_slack"] = slack if len(sound) > 1 else 0.0
    facts["mean_rest"] = min(1.0, slack + (float(means[order[-1]]) if ids.size > MAX_MEAN_IDS else 0.0))
    return facts


def _rest(message: Signals) -> float | None:
    """What an id that the rank does not name can have at most; None where its mean prediction contradicts itself.

    That is the lowest that it names, or what is left.
    """
    ids, values = message.mean_ids, message.mean_probabilities
    if not ids.size or ids.shape != values.shape or ids.ndim != 1:
        return None
    named, least = ids.tolist(), values.min()
    if not least >= 0 or min(named) < 0 or max(named) > MAX_ID or len(set(named)) < ids.size:  # not >=: a NaN too
        return None
    total = float(values.sum(dtype=np.float64))
    return float(min(least, max(0.0, 1.0 - total))) if total <= 1.01 else None
