"""``loss/``: what the per-token losses of one step say, over all its ranks and micro-batches (docs/metrics.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.limits import LOSS_HISTOGRAM_BINS, MAX_EXACT_LOSS_TOKENS_PER_STEP
from sidestep.protocol.messages import Losses, Role
from sidestep.worker.metrics.highest_tokens import highest_tokens
from sidestep.worker.metrics.loss_partials import NUM_PARTIALS, LossPartials
from sidestep.worker.metrics.measurement import (
    Measurement,
    distinct_batches,
    messages_of,
    notice_once,
    same_length,
)
from sidestep.worker.records import Part, RunContext

_ALL_IGNORED = (
    "a step has no labelled token, every label is the ignored one: such steps have no loss/* but loss/trainer"
)
_NOT_FINITE = (
    "labelled tokens have losses that are not finite: loss/nonfinite_tokens counts them, the rest of loss/* is without "
    "them"
)


def measure_loss(
    parts: Sequence[Part],
    context: RunContext,
    *,
    high_loss_sigmas: float = 2.0,
    max_exact_tokens: int = MAX_EXACT_LOSS_TOKENS_PER_STEP,
) -> Measurement:
    """Return ``loss/*`` of one step from the ``Losses`` of all its ranks and micro-batches.

    Token by token up to ``max_exact_tokens``; above them, or where a part has only a histogram, from merged partials
    with ``loss/exact`` 0. A part that has no losses for its labelled tokens makes the step a sample of itself:
    ``loss/sampled_tokens`` stands there and ``loss/min`` and ``loss/max`` do not.
    """
    found = Measurement()
    received = messages_of(distinct_batches(parts, context), Losses)
    batches = [(rank, message) for rank, message in received if _is_sound(message)]
    found.malformed_parts = len(received) - len(batches)
    if not batches:
        return found
    messages = [message for _, message in batches]
    _measure_trainer(messages, found)
    _tell_reasons(messages, found)
    if not sum(message.labelled for message in messages):
        found.notices.append(notice_once("no_labelled_token", _ALL_IGNORED, messages[0].step))
    if any(_num_losses(message) for message in messages):
        is_sample = any(message.sampled or _lacks_losses(message) for message in messages)
        too_large = sum(map(_num_losses, messages)) > max_exact_tokens
        if too_large or any(message.histogram.size for message in messages):
            _measure_merged(messages, found, high_loss_sigmas, is_sample=is_sample)
        else:
            _measure_exact(_Losses.of(messages), found, high_loss_sigmas, is_sample=is_sample)
        if found.values.get("loss/nonfinite_tokens"):
            found.notices.append(notice_once("loss_nonfinite", _NOT_FINITE, messages[0].step))
        table = highest_tokens(batches, context)
        if table is not None:
            found.tables.append(table)
    return found


def _num_losses(batch: Losses) -> int:
    return int(batch.histogram.sum()) + int(batch.partials[5]) if batch.histogram.size else batch.losses.size


def _lacks_losses(batch: Losses) -> bool:
    return batch.labelled > 0 and not batch.losses.size and not batch.histogram.size


def _is_sound(batch: Losses) -> bool:
    if not same_length(batch.losses, batch.target_ids, batch.roles) or batch.labelled < 0:
        return False
    if not batch.histogram.size:
        return True
    return (
        batch.histogram.shape == (LOSS_HISTOGRAM_BINS,)
        and bool((batch.histogram >= 0).all())
        and batch.partials.shape == (NUM_PARTIALS,)
        and LossPartials.are_sound(batch)
    )


def _measure_trainer(batches: Sequence[Losses], found: Measurement) -> None:
    said = np.concatenate([batch.trainer_loss for batch in batches]).astype(np.float64)
    finite = said[np.isfinite(said)]
    if finite.size:
        found.put("loss/trainer", float(finite.mean()))
    if finite.size < said.size:
        found.put("loss/trainer_nonfinite", said.size - finite.size)


def _tell_reasons(batches: Sequence[Losses], found: Measurement) -> None:
    for reason in sorted({batch.reason for batch in batches if batch.reason and _lacks_losses(batch)}):
        text = f"no per-token losses: {reason}; loss/trainer is all that can be shown"
        found.notices.append(notice_once(f"loss_absent:{reason}", text, batches[0].step))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Losses:
    """The finite losses of a step, and how many labelled tokens each stands for."""

    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    roles: NDArray[np.uint8]
    num_nonfinite: int

    @classmethod
    def of(cls, batches: Sequence[Losses]) -> Self:
        values = np.concatenate([batch.losses for batch in batches]).astype(np.float64)
        finite = np.isfinite(values)
        return cls(
            values=values[finite],
            weights=np.concatenate([_weights(batch) for batch in batches])[finite],
            roles=np.concatenate([batch.roles for batch in batches])[finite],
            num_nonfinite=int(values.size - finite.sum()),
        )

    def mean(self, chosen: NDArray[np.bool_] | None = None) -> float | None:
        values, weights = (self.values, self.weights) if chosen is None else (self.values[chosen], self.weights[chosen])
        return float((values * weights).sum() / weights.sum()) if values.size else None

    def std(self, mean: float) -> float | None:
        """With n - 1; the weights of a sample cancel but for their differences."""
        if self.values.size < 2:
            return None
        squares = float((np.square(self.values - mean) * self.weights).sum() / self.weights.sum())
        return math.sqrt(squares * self.values.size / (self.values.size - 1))


def _weights(batch: Losses) -> NDArray[np.float64]:
    """A sampled loss stands for as many labelled tokens as were looked past for it."""
    weight = batch.labelled / batch.losses.size if batch.sampled and batch.losses.size else 1.0
    return np.full(batch.losses.size, max(weight, 1.0))


def _measure_exact(losses: _Losses, found: Measurement, sigmas: float, *, is_sample: bool) -> None:
    mean = losses.mean()
    found.put("loss/total", mean)
    first = losses.mean(_has_role(losses.roles, Role.FIRST))
    later = losses.mean(_has_role(losses.roles, Role.LATER))
    _put_first_and_later(found, first, later)
    std = losses.std(mean) if mean is not None else None
    if std is not None and mean is not None:
        found.put("loss/std", std)
        high = losses.weights[losses.values > mean + sigmas * std]
        found.put_ratio("loss/high_loss_token_ratio", float(high.sum()), float(losses.weights.sum()))
    _put_extent(
        found,
        low=float(losses.values.min()) if losses.values.size else None,
        high=float(losses.values.max()) if losses.values.size else None,
        sampled_tokens=losses.values.size + losses.num_nonfinite if is_sample else None,
    )
    found.put("loss/nonfinite_tokens", losses.num_nonfinite)
    found.put("loss/exact", 0 if is_sample else 1)


def _has_role(roles: NDArray[Any], role: Role) -> NDArray[np.bool_]:
    return np.asarray((roles & int(role)) != 0)


def _measure_merged(batches: Sequence[Losses], found: Measurement, sigmas: float, *, is_sample: bool) -> None:
    merged = LossPartials.merged([LossPartials.of(batch) for batch in batches])
    found.put("loss/total", merged.moments.value_mean)
    _put_first_and_later(found, merged.first_mean, merged.later_mean)
    found.put("loss/std", merged.moments.std)
    found.put("loss/high_loss_token_ratio", merged.high_share(sigmas))
    has_any = merged.moments.count > 0
    _put_extent(
        found,
        low=merged.low if has_any else None,
        high=merged.high if has_any else None,
        sampled_tokens=merged.moments.count + merged.num_nonfinite if is_sample else None,
    )
    found.put("loss/nonfinite_tokens", merged.num_nonfinite)
    found.put("loss/exact", 0)


def _put_first_and_later(found: Measurement, first: float | None, later: float | None) -> None:
    found.put("loss/first_token", first)
    found.put("loss/later_tokens", later)
    if first is not None and later is not None:
        found.put_ratio("loss/first_vs_later_ratio", first, later)


def _put_extent(found: Measurement, *, low: float | None, high: float | None, sampled_tokens: int | None) -> None:
    """The extremes of a sample are not the step's: they are left out (docs/metrics.md, ``loss/``)."""
    if sampled_tokens is not None:
        found.put("loss/sampled_tokens", sampled_tokens)
        return
    found.put("loss/min", low)
    found.put("loss/max", high)
