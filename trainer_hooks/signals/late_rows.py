"""What can wait for the publisher's thread: rows of logits, images and projector outputs that are on the host anyway.

In a training on the CPU every small operation among a step's cold caches costs the training thread some tens of
microseconds. So where the values are few, the training thread copies them and nothing else, and numpy does the rest
elsewhere: the same numbers as ``rows.py``, ``images.py`` and ``projector.py`` work out on a device. A test holds them
equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestep.trainer_hooks.reductions.position_hash import position_hash_on_host
from sidestep.trainer_hooks.reductions.runs import HostRuns
from sidestep.trainer_hooks.signals.images import PLACE_FACTORS
from sidestep.trainer_hooks.signals.rows import LEAST_LOGIT

MAX_LATE_BYTES = 4 << 20
"""Of one micro-batch's rows, images or projector output, each: more is reduced on the spot."""
TOKEN_AXES = 3
"""Of a projector's output that tells images and their tokens apart; with fewer, each row stands for an image."""


@dataclass(frozen=True, slots=True)
class RowWindow:
    """Consecutive labelled rows of a micro-batch, of which whole answers will be kept."""

    start: int
    """How many labelled rows come before."""
    index: NDArray[np.int64]
    """Flat indices of their positions, ascending [n]."""
    num_labelled: int
    """Labelled rows of the micro-batch."""


def labelled_rows(labels: NDArray[Any], ignore_index: int, *, shifted: bool) -> NDArray[np.int64]:
    """Return the flat positions of logits that have a target, ascending; of labels [B, T]."""
    if shifted:
        found: NDArray[np.int64] = (labels != ignore_index).reshape(-1).nonzero()[0]
        return found
    index: NDArray[np.int64] = (labels[:, 1:] != ignore_index).reshape(-1).nonzero()[0]
    index += index // max(1, labels.shape[1] - 1)
    return index


def choose_window(rows: NDArray[np.int64], max_rows: int, seed: int) -> RowWindow:
    """Choose ``max_rows`` consecutive rows, another place for another seed."""
    start = 0
    if rows.size > max_rows:
        draw = int(position_hash_on_host(np.array([rows.size]), seed)[0])
        start = draw % (rows.size - max_rows + 1)
    return RowWindow(start, rows[start : start + max_rows], rows.size)


def whole_answers(window: RowWindow, runs: HostRuns) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Return which rows of a window belong to whole answers, each row's place in its answer, and its answer's number.

    Where the window holds no whole answer, all of its rows are kept.
    """
    numbers = np.arange(window.start, window.start + window.index.size)
    answers = np.searchsorted(runs.first, numbers, side="right") - 1
    first, stop = runs.first[answers], runs.stop[answers]
    kept: NDArray[np.bool_] = (first >= window.start) & (stop <= window.start + window.index.size)
    if not kept.any():
        kept = np.ones(numbers.size, np.bool_)
    return kept, numbers - first, answers


def reduce_rows(
    logits: NDArray[np.float32], targets: NDArray[np.int64], eos_id: int | None
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """Return numbers float32 [4, n], predictions int32 [n] and the sum of probabilities float32 [V] (``rows.py``).

    Args:
        logits: float32 [n, V]; overwritten.
        targets: [n]; outside the vocabulary the loss is NaN.
        eos_id: the id whose probability is wanted.
    """
    count, width = logits.shape
    each = np.arange(count)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        predictions = logits.argmax(axis=1)
        logits -= logits[each, predictions][:, None]
        np.maximum(logits, np.float32(LEAST_LOGIT), out=logits)
        known = (targets >= 0) & (targets < width)
        of_target = logits[each, np.clip(targets, 0, width - 1)]
        exponentials = np.exp(logits)
        total = exponentials.sum(axis=1)
        normalizer = np.log(total)
        numbers = np.zeros((4, count), np.float32)
        numbers[0] = np.where(known, normalizer - of_target, np.nan)
        numbers[1] = normalizer - np.multiply(logits, exponentials, out=logits).sum(axis=1) / total
        exponentials /= total[:, None]
        if eos_id is not None and eos_id < width:
            numbers[2] = exponentials[:, eos_id]
        numbers[3] = 1.0 / total
    return numbers, predictions.astype(np.int32), exponentials.sum(axis=0)


def highest_means(sums: NDArray[np.float32], count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the ``count`` ids of the largest sums, the largest first, and those sums."""
    count = min(count, sums.size)
    if count <= 0:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    ids = np.argpartition(sums, sums.size - count)[sums.size - count :]
    ids = ids[np.lexsort((ids, -sums[ids]))]
    return ids.astype(np.int32), sums[ids]


def late_image_numbers(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Return what ``image_numbers`` does, of images [n, pixels]; float32 [n, 4]."""
    values = pixels.astype(np.float32)
    mean = values.mean(axis=1, keepdims=True)
    square = np.square(values).mean(axis=1)
    places = np.arange(values.shape[1], dtype=np.float32)
    centred = values - mean
    sums = [
        (centred * (np.modf(places * np.float32(factor))[0] - np.float32(0.5))).mean(axis=1) for factor in PLACE_FACTORS
    ]
    return np.stack((mean[:, 0], square, *sums), axis=1).astype(np.float32)


def late_projector_numbers(value: NDArray[Any]) -> NDArray[np.float32]:
    """Return what ``projector_numbers`` does, of [images, tokens, features] or [rows, features]; float32 [2]."""
    values = value.astype(np.float32)
    rms = float(np.sqrt(np.square(values).mean()))
    features = values.shape[-1]
    if values.ndim < TOKEN_AXES:
        means = values.reshape(-1, features)
    else:
        means = values.reshape(values.shape[0], -1, features).mean(axis=1)
    if means.shape[0] < 2:
        return np.array([rms, -1.0], np.float32)
    return np.array([rms, float(np.sqrt(np.square(means - means.mean(axis=0)).mean()))], np.float32)
