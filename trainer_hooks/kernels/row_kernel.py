"""Triton source of what the model says at labelled rows of its logits: one program per row, which reads it once.

A program keeps one running maximum and one pair of sums for each of its lanes and joins them when the row ends, so that
nothing is waited for in between; a row that does not count is not read. The mean of the rows' probabilities needs their
normalizers first and is a second pass, by column, each program over rows of its own in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

jit: Callable[[Callable[..., Any]], Any] = triton.jit

LEAST = tl.constexpr(-1e30)
"""Stands for logits of minus infinity, as ``LEAST_LOGIT`` does in ``signals/rows.py``."""


@jit
def _at_least(values: tl.tensor) -> tl.tensor:
    """Return the values, none below ``LEAST``; what is no number stays none."""
    return tl.maximum(values, LEAST, propagate_nan=tl.PropagateNan.ALL)


@jit
def _exp(values: tl.tensor, native: tl.constexpr) -> tl.tensor:
    if native:
        made = libdevice.fast_expf(values)  # what is below 2**-126 is 0
    else:
        made = tl.exp(values)
    return made


@jit
def _base(
    logits: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    number: tl.tensor,
    positions: tl.tensor,
    last: tl.tensor,
    row_stride: tl.tensor,
    position_stride: tl.tensor,
    is_listed: tl.constexpr,
) -> tl.tensor:
    """Return where a row's logits begin."""
    if is_listed:
        row = tl.load(rows + number)
        place = tl.load(places + number)
    else:
        row = (number // positions).to(tl.int64)
        place = (number % positions).to(tl.int64)
    return logits + row * row_stride + tl.minimum(place, last) * position_stride


@jit
def read_rows(
    logits: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    targets: tl.tensor,
    weights: tl.tensor,
    numbers: tl.tensor,
    predictions: tl.tensor,
    normalizers: tl.tensor,
    count: tl.tensor,
    positions: tl.tensor,
    last: tl.tensor,
    row_stride: tl.tensor,
    position_stride: tl.tensor,
    width: tl.tensor,
    eos: tl.tensor,
    is_listed: tl.constexpr,
    is_weighted: tl.constexpr,
    has_eos: tl.constexpr,
    lanes: tl.constexpr,
    depth: tl.constexpr,
    rounds: tl.constexpr,
    native: tl.constexpr,
) -> None:
    """Read one row.

    Args:
        logits: float32, bfloat16 or float16 [B, T, V], its last axis contiguous.
        rows: int64 [count], read where ``is_listed``; else program i reads place i of B * ``positions``.
        places: int64 [count], positions within their rows.
        targets: int64 [count]; outside the vocabulary the loss is NaN.
        weights: [count], read where ``is_weighted``: at a weight of 0 the program ends at once.
        numbers: float32 [4, count]: loss, entropy, probability of EOS, highest probability; 0 where nothing is read.
        predictions: int32 [count].
        normalizers: float32 [2, count]: the largest logit, and one over the sum of the exponentials.
        count: number of programs.
        positions: places of a row, where none are listed.
        last: T - 1; a place beyond it is brought there.
        row_stride: elements from one of B to the next.
        position_stride: elements from one of T to the next.
        width: V.
        eos: an id within the vocabulary, read where ``has_eos``.
        is_listed: whether ``rows`` and ``places`` say which rows are read.
        is_weighted: whether ``weights`` say which of them count.
        has_eos: whether ``eos`` is an id.
        lanes: logits that are read side by side.
        depth: logits of a lane that are read together.
        rounds: as many as ``lanes * depth`` go into ``width``, rounded up.
        native: whether to use the device's own exponential.
    """
    number = tl.program_id(0)
    out = numbers + number
    counts = True
    if is_weighted:
        counts = tl.load(weights + number).to(tl.float32) != 0.0
    if counts:
        base = _base(logits, rows, places, number, positions, last, row_stride, position_stride, is_listed)
        lane = tl.arange(0, lanes)
        offsets = tl.arange(0, depth)[:, None] * lanes + lane[None, :]
        best = tl.full((lanes,), LEAST, tl.float32)
        best_round = tl.zeros((lanes,), tl.int32)
        total = tl.zeros((lanes,), tl.float32)
        weighted = tl.zeros((lanes,), tl.float32)
        for turn in range(rounds):
            columns = turn * (lanes * depth) + offsets
            values = tl.load(base + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
            highest = tl.max(values, axis=0)
            is_better = highest > best
            now = tl.where(is_better, highest, best)
            best_round = tl.where(is_better, turn, best_round)
            fallen = best - now
            kept = _exp(fallen, native)
            weighted = kept * (weighted + fallen * total)
            total = kept * total
            below = _at_least(values - now[None, :])
            exponentials = _exp(below, native)
            total += tl.sum(exponentials, axis=0)
            weighted += tl.sum(exponentials * below, axis=0)
            best = now
        most = tl.max(best, axis=0)
        fallen = best - most
        kept = _exp(fallen, native)
        weighted_sum = tl.sum(kept * (weighted + fallen * total), axis=0)
        whole = tl.sum(kept * total, axis=0)
        whole = tl.where(whole == 0.0, float("nan"), whole)  # a row of nothing but minus infinity
        # The first of the largest logits: in the first of the rounds that saw it, which is read again.
        turn = tl.min(tl.where(best == most, best_round, rounds - 1), axis=0)
        columns = turn * (lanes * depth) + offsets
        values = tl.load(base + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        first = tl.min(tl.min(tl.where(values == most, columns, width - 1), axis=0), axis=0)
        target = tl.load(targets + number)
        is_known = (target >= 0) & (target < width)
        of_target = tl.load(base + target, mask=is_known, other=0.0).to(tl.float32)
        normalizer = tl.log(whole)
        tl.store(out, tl.where(is_known, normalizer - _at_least(of_target - most), float("nan")))
        tl.store(out + count, normalizer - weighted_sum / whole)
        eos_probability = tl.full((), 0.0, tl.float32)
        if has_eos:
            eos_probability = _exp(_at_least(tl.load(base + eos).to(tl.float32) - most), native) / whole
        tl.store(out + 2 * count, eos_probability)
        tl.store(out + 3 * count, 1.0 / whole)
        tl.store(predictions + number, first)
        tl.store(normalizers + number, most)
        tl.store(normalizers + count + number, 1.0 / whole)
    else:
        for column in tl.static_range(4):
            tl.store(out + column * count, 0.0)
        tl.store(predictions + number, 0)


@jit
def add_probabilities(
    logits: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor,
    normalizers: tl.tensor,
    partials: tl.tensor,
    count: tl.tensor,
    positions: tl.tensor,
    last: tl.tensor,
    row_stride: tl.tensor,
    position_stride: tl.tensor,
    width: tl.tensor,
    is_listed: tl.constexpr,
    is_weighted: tl.constexpr,
    lanes: tl.constexpr,
    group: tl.constexpr,
    native: tl.constexpr,
) -> None:
    """Add up the probabilities of ``lanes`` ids over ``group`` rows, in the rows' order.

    Args:
        logits: as ``read_rows`` takes them; so are ``rows``, ``places``, ``weights`` and the strides.
        rows: see there.
        places: see there.
        weights: what each row counts for, where ``is_weighted``; one of 0 is not read.
        normalizers: float32 [2, count], as ``read_rows`` left them.
        partials: float32 [groups, V].
        count: number of rows.
        positions: see there.
        last: see there.
        row_stride: see there.
        position_stride: see there.
        width: V.
        is_listed: see there.
        is_weighted: see there.
        lanes: ids of a program.
        group: rows of a program.
        native: whether to use the device's own exponential.
    """
    columns = tl.program_id(0) * lanes + tl.arange(0, lanes)
    is_there = columns < width
    total = tl.zeros((lanes,), tl.float32)
    for member in range(group):
        number = tl.program_id(1) * group + member
        weight = tl.full((), 0.0, tl.float32)
        if number < count:
            weight += 1.0
            if is_weighted:
                weight *= tl.load(weights + number).to(tl.float32)
        if weight != 0.0:
            base = _base(logits, rows, places, number, positions, last, row_stride, position_stride, is_listed)
            most = tl.load(normalizers + number)
            share = tl.load(normalizers + count + number) * weight
            values = tl.load(base + columns, mask=is_there, other=float("-inf")).to(tl.float32)
            total += _exp(_at_least(values - most), native) * share
    tl.store(partials + tl.program_id(1).to(tl.int64) * width + columns, total, mask=is_there)
