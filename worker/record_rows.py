"""The rows of a step's record: the labelled positions of all ranks, joined, weighted and thinned to a fixed number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Signals
from sidestep.worker.step_record import MAX_ID, MAX_MEAN_IDS, MAX_RECORD_RANKS, MAX_RECORD_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRows:
    """The sound rows of one rank."""

    rank: int
    weight: float
    """Labelled positions that each row stands for."""
    targets: NDArray[np.int32]
    predictions: NDArray[np.int32]
    losses: NDArray[np.float16]
    entropies: NDArray[np.float16]
    eos_probabilities: NDArray[np.float16]
    places: NDArray[np.uint8]
    nonfinite: int
    """Rows left out because their loss or entropy is no number."""


def sound_rows(rank: int, message: Signals) -> RankRows | None:
    """Return the rows of a rank that can be read; None where the arrays contradict each other or there are none."""
    size = message.targets.size
    if not size or any(array.shape != (size,) for array in (message.targets, message.losses, message.places)):
        return None
    optional = (message.predictions, message.entropies, message.eos_probabilities)
    if any(array.size and array.shape != (size,) for array in optional):
        return None
    finite = np.isfinite(message.losses)
    if message.entropies.size:
        finite &= np.isfinite(message.entropies)
    known = (message.targets >= 0) & (message.targets <= MAX_ID) & (message.losses >= 0)
    if message.predictions.size:
        known &= (message.predictions >= 0) & (message.predictions <= MAX_ID)
    kept = finite & known if not (finite & known).all() else slice(None)
    targets = message.targets[kept]
    return RankRows(
        rank=rank,
        weight=max(float(message.labelled), float(size)) / size,
        targets=targets,
        predictions=message.predictions[kept] if message.predictions.size else message.predictions,
        losses=message.losses[kept],
        entropies=message.entropies[kept] if message.entropies.size else message.entropies,
        eos_probabilities=message.eos_probabilities[kept]
        if message.eos_probabilities.size
        else message.eos_probabilities,
        places=message.places[kept],
        nonfinite=int((~finite).sum()),
    )


def row_facts(rows: Sequence[RankRows]) -> dict[str, Any]:
    """Return the fields of a record that are made of rows."""
    nonfinite = sum(each.nonfinite for each in rows)
    sound = [each for each in rows if each.targets.size]
    if not sound:
        return {"nonfinite_losses": nonfinite}
    # What one rank lacks nobody has: rows of unequal meaning would be compared.
    has = {
        name: all(getattr(each, name).size for each in sound)
        for name in ("predictions", "entropies", "eos_probabilities")
    }
    joined = {
        name: np.concatenate([getattr(each, name) for each in sound])
        for name in ("targets", "losses", "places", *(name for name, is_there in has.items() if is_there))
    }
    starts = np.concatenate([_answer_starts(each.places) for each in sound])
    kept = _thinned(starts, MAX_RECORD_ROWS)
    ranks, rank_rows = _rank_runs(sound, kept)
    facts: dict[str, Any] = {name: values[kept] for name, values in joined.items()}
    total = sum(each.weight * each.targets.size for each in sound)
    facts["loss"] = _weighted(sound, "losses") / total
    if has["entropies"]:
        facts["entropy"] = _weighted(sound, "entropies") / total
    seen = int(joined["targets"].size)
    return {**facts, "ranks": ranks, "rank_rows": rank_rows, "seen_rows": seen, "nonfinite_losses": nonfinite}


def _weighted(rows: Sequence[RankRows], name: str) -> float:
    return sum(each.weight * float(getattr(each, name).sum(dtype=np.float64)) for each in rows)


def _answer_starts(places: NDArray[np.uint8]) -> NDArray[np.bool_]:
    starts: NDArray[np.bool_] = places == 0
    starts[0] = True
    return starts


def _thinned(starts: NDArray[np.bool_], limit: int) -> NDArray[np.int64] | slice:
    """Return the rows to keep: all, or those of answers evenly spread, in at most ``limit`` rows."""
    size = starts.size
    if size <= limit:
        return slice(None)
    answers = np.cumsum(starts) - 1
    num_answers = int(answers[-1]) + 1
    share = limit / size
    taken = np.floor((np.arange(num_answers) + 1) * share) > np.floor(np.arange(num_answers) * share)
    if not taken.any():
        taken[0] = True
    return np.flatnonzero(taken[answers])[:limit]


def _rank_runs(
    rows: Sequence[RankRows], kept: NDArray[np.int64] | slice
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the ranks that have rows, and how many each; ranks beyond the limit are joined under -1."""
    places = np.concatenate([np.full(each.targets.size, place, np.int64) for place, each in enumerate(rows)])[kept]
    counts = np.bincount(places, minlength=len(rows))
    ranks = [each.rank for each in rows][:MAX_RECORD_RANKS]
    numbers = counts[:MAX_RECORD_RANKS].tolist()
    if len(rows) > MAX_RECORD_RANKS:
        ranks.append(-1)
        numbers.append(int(counts[MAX_RECORD_RANKS:].sum()))
    return np.array(ranks, np.int32), np.array(numbers, np.int32)


def mean_facts(signals: Sequence[Signals], rows: Sequence[RankRows]) -> dict[str, Any]:
    """Merge the ranks' mean predictions, and count the same ids among the targets of the same rows.

    The targets counted are all that the rank sent, sound or not: the mean prediction is over them too.
    """
    sound = [m for m in signals if m.targets.ndim == 1 and m.targets.size and _is_sound_mean(m)]
    top = [(m.top_probability, m.targets.size) for m in signals if 0 <= m.top_probability <= 1 and m.targets.size]
    facts: dict[str, Any] = {}
    if top:
        facts["top_probability"] = sum(value * size for value, size in top) / sum(size for _, size in top)
    if not sound or len(sound) < len(rows):
        return facts
    weights = np.array([max(float(m.labelled), float(m.targets.size)) for m in sound])
    weights /= weights.sum()
    ids, places = np.unique(np.concatenate([m.mean_ids for m in sound]), return_inverse=True)
    values = np.concatenate([m.mean_probabilities.astype(np.float64) * w for m, w in zip(sound, weights, strict=True)])
    means = np.bincount(places.reshape(-1), weights=values, minlength=ids.size)
    order = np.lexsort((ids, -means))[:MAX_MEAN_IDS]
    targets = np.concatenate([m.targets for m in sound])
    row_weights = np.repeat(weights / [m.targets.size for m in sound], [m.targets.size for m in sound])
    found = np.minimum(np.searchsorted(ids, targets), ids.size - 1)
    is_named = ids[found] == targets
    shares = np.bincount(found[is_named], weights=row_weights[is_named], minlength=ids.size)[order]
    rests = [_rest(m) for m in sound]
    facts["mean_ids"] = ids[order].astype(np.int32)
    facts["mean_probabilities"] = means[order].astype(np.float32)
    facts["mean_shares"] = shares.astype(np.float32)
    slack = float(np.dot(weights, rests))
    facts["mean_slack"] = slack if len(sound) > 1 else 0.0
    facts["mean_rest"] = min(1.0, slack + (float(means[order[-1]]) if ids.size > MAX_MEAN_IDS else 0.0))
    return facts


def _is_sound_mean(message: Signals) -> bool:
    ids, values = message.mean_ids, message.mean_probabilities
    if not ids.size or ids.shape != values.shape or ids.ndim != 1:
        return False
    if not (ids.min() >= 0 and ids.max() <= MAX_ID and values.min() >= 0):  # False for a NaN as well
        return False
    return float(values.sum(dtype=np.float64)) <= 1.01 and len(set(ids.tolist())) == ids.size


def _rest(message: Signals) -> float:
    """What an id that the rank does not name can have at most: the lowest it names, or what is left."""
    values = message.mean_probabilities
    return float(min(values.min(), max(0.0, 1.0 - float(values.sum(dtype=np.float64)))))
