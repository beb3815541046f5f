"""Mean prediction against the targets of the same rows: a token that gets more, or far less, than its share.

At the best bias of its logits a model gives every token its frequency on average, whatever else it knows (the design is
in docs/detection.md): an honest model of 85 % "A" gives "A" 0.85. Most probable tokens have no such property: the same
model says "A" always. ``copying`` is the collapse that this cannot see: the token before, said again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.loss_pairs import LossPairs
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.rules import Mass
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.token_table import is_among
from sidestep.worker.detectors.view import StepView

MAX_TARGETS: Final = 32
"""Most frequent targets of a step that are remembered beside the ids of its mean prediction."""
MAX_CLUSTER: Final = 4.0
"""Rows of an answer that count as one: its tokens are not independent."""
PEAK_STEPS: Final = 64
"""Steps before the window whose own excess tells how unlike steps are."""
USUAL_PEAK: Final = 2.0
"""Standard errors that a single step's largest excess hardly ever has where rows are drawn one by one (measured: up to
1.8 in 125 of 133 healthy runs, 2.9 in all; 13.9 where each step is of one task)."""


OTHER_LOSS: Final = 0.1
"""Logarithm of the ratio of the trainer's loss to the cross-entropy from which it is another one."""
OTHER_SHARE: Final = 0.95
"""Part of its share that a token may lose to another loss: one that gets nothing is forgotten all the same."""
RARE: Final = 0.5
"""Part of the most frequent target's share below which a token is a rarer one."""
LOSS_ERRORS: Final = 6.0
"""Standard errors of the cross-entropy that they must be apart as well, where its rows are a sample."""


@dataclass(frozen=True, slots=True)
class _Pooled:
    """One step of the window."""

    rows: float
    cluster: float
    rest: float
    ids: NDArray[np.int32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    share: NDArray[np.float32]
    pairs: float
    """Rows with a row of the same answer before them."""
    copies: float
    """Of these, where the prediction is the target before."""
    repeats: float
    """Of these, where the target is the target before."""


class MassExcess:
    """``mass_excess``, ``mass_deficit`` and ``copying`` over a window of steps."""

    name = "mass"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._window: list[_Pooled] = []
        self._peaks: list[float] = []  # largest excess of each of the last steps, in its standard errors
        self._losses = LossPairs(settings.mass_excess.min_steps)

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge the window that ends with this step."""
        rule = self._settings.mass_excess
        pooled = _pool(view)
        if pooled is None:
            return ()
        self._window = [*self._window, pooled][-rule.max_steps :]
        self._peaks = [*self._peaks, _peak(pooled)][-(PEAK_STEPS + rule.max_steps) :]
        self._losses.take(view)
        chosen = self._chosen(rule)
        if chosen is None:
            return ()
        self._window = chosen  # the next step needs no older ones
        return [*self._judge_mass(chosen), *self._judge_copying(chosen)]

    def _chosen(self, rule: Mass) -> list[_Pooled] | None:
        """Return the newest steps that are enough: at least so many steps and rows. None below both limits."""
        rows = 0.0
        for number, each in enumerate(reversed(self._window), start=1):
            rows += each.rows
            if number >= rule.min_steps and rows >= rule.min_rows:
                return self._window[-number:]
        return self._window if len(self._window) >= rule.max_steps else None

    def _judge_mass(self, chosen: list[_Pooled]) -> Iterator[Reading]:
        named = [each for each in chosen if each.ids.size]
        if not named:
            return
        rows = sum(each.rows for each in named)
        ids, places = np.unique(np.concatenate([each.ids for each in named]), return_inverse=True)
        places = places.reshape(-1)

        weights = np.repeat([each.rows for each in named], [each.ids.size for each in named])

        def total(values: list[NDArray[np.float32]]) -> NDArray[np.float64]:
            sums = np.bincount(places, weights=np.concatenate(values) * weights, minlength=ids.size)
            return sums.astype(np.float64, copy=False) / rows

        low = total([each.low for each in named])
        share = total([each.share for each in named])
        # Where a step does not name an id, it may have had up to the rest of that step.
        rest = sum(each.rest * each.rows for each in named) / rows
        high = total([each.high - np.float32(each.rest) for each in named]) + rest
        independent = rows / (sum(each.cluster * each.rows for each in named) / rows)
        error = _error(low, share, independent) * self._unlikeness(len(chosen))
        excess, deficit = self._settings.mass_excess, self._settings.mass_deficit
        has_other_loss, is_rare = self._has_other_loss(excess), share < RARE * share.max()
        for rule, name, differences, is_excused in (
            (excess, "mass_excess", low - share, is_rare & has_other_loss),
            (deficit, "mass_deficit", share - high, ~is_rare & has_other_loss),
        ):
            least = np.where(is_excused, rule.other_loss, 1.0) * rule.threshold
            least = np.maximum(least, np.where(is_excused, OTHER_SHARE, rule.share) * share)
            yield self._worst(rule, name, ids=ids, differences=differences, share=share, error=error, least=least)

    def _has_other_loss(self, rule: Mass) -> bool:
        """Whether another loss than the cross-entropy is trained on, whose best model gives tokens other shares.

        People who weigh classes take from the frequent and give to the rare; the other way round is nobody's purpose.
        """
        if len(self._losses) < rule.min_steps:
            return False
        told, own, squared_error = self._losses.means()
        return abs(math.log(told / own)) > OTHER_LOSS and abs(told - own) > LOSS_ERRORS * math.sqrt(squared_error)

    def _unlikeness(self, num_chosen: int) -> float:
        """How many times as far as single rows would be the steps before these are apart; at least 1.

        The second largest peak: one step alone may be an event of its own.
        """
        before = sorted(self._peaks[:-num_chosen][-PEAK_STEPS:])
        return max(1.0, before[-2] / USUAL_PEAK) if len(before) > 1 else 1.0

    @staticmethod
    def _worst(
        rule: Mass,
        name: str,
        *,
        ids: NDArray[np.int32],
        differences: NDArray[np.float64],
        share: NDArray[np.float64],
        error: NDArray[np.float64],
        least: NDArray[np.float64],
    ) -> Reading:
        limits = np.maximum(least, rule.errors * error)
        place = int((differences - limits).argmax())
        value, limit, token = float(differences[place]), float(limits[place]), int(ids[place])
        sign = 1.0 if name == "mass_excess" else -1.0
        given = float(share[place]) + sign * value
        evidence = f"{{token}} is {share[place]:.1%} of the targets and gets {max(given, 0.0):.1%} of the probability"
        return Reading(
            name=name, value=value, limit=limit, is_beyond=value > limit, reference=float(share[place]), token=token,
            evidence=evidence,
        )  # fmt: skip

    def _judge_copying(self, chosen: list[_Pooled]) -> Iterator[Reading]:
        pairs = sum(each.pairs for each in chosen)
        rule = self._settings.copying
        if pairs < rule.min_rows:
            return
        copies, repeats = (sum(getattr(each, name) for each in chosen) / pairs for name in ("copies", "repeats"))
        value = copies - repeats
        evidence = f"{copies:.1%} of the predictions are the token before, {repeats:.1%} of the targets are"
        yield Reading(
            name="copying", value=value, limit=rule.threshold, is_beyond=value > rule.threshold, reference=repeats,
            evidence=evidence,
        )  # fmt: skip

    def forget(self) -> None:
        """Begin a new window."""
        self._window, self._peaks = [], []
        self._losses.clear()

    def state(self) -> Json:
        """Return the window, and how far the steps before it were apart."""
        window = [
            [
                each.rows, each.cluster, each.rest, each.pairs, each.copies, each.repeats,
                *(values.tobytes() for values in (each.ids, each.low, each.high, each.share)),
            ]
            for each in self._window
        ]  # fmt: skip
        return {"window": window, "peaks": self._peaks, "losses": self._losses.state()}

    def restore(self, state: Any) -> None:
        """Take over a state; a list alone is one from before there were peaks."""
        window, peaks = (state["window"], state["peaks"]) if isinstance(state, Mapping) else (state, ())
        self._window = [_unpacked(row) for row in window]
        self._peaks = [float(peak) for peak in peaks]
        self._losses.restore(state.get("losses", ()) if isinstance(state, Mapping) else ())


def _unpacked(row: Sequence[Any]) -> _Pooled:
    rows, cluster, rest, pairs, copies, repeats, ids, low, high, share = row
    return _Pooled(
        float(rows), float(cluster), float(rest), np.frombuffer(ids, "<i4"), np.frombuffer(low, "<f4"),
        np.frombuffer(high, "<f4"), np.frombuffer(share, "<f4"), float(pairs), float(copies), float(repeats),
    )  # fmt: skip


def _peak(step: _Pooled) -> float:
    """Return the largest excess of one step alone, in standard errors of its rows."""
    if not step.ids.size:
        return 0.0
    independent = max(step.rows / step.cluster, 1.0)
    return float(((step.low - step.share) / _error(step.low, step.share, independent)).max())


def _error(low: NDArray[Any], share: NDArray[Any], independent: float) -> NDArray[Any]:
    """Return the standard error of each token's share among so many independent rows."""
    wide = np.maximum(np.maximum(low, share), 1.0 / independent)
    error: NDArray[Any] = np.sqrt(wide * np.maximum(1.0 - wide, 0.05) / independent)
    return error


def _pool(view: StepView) -> _Pooled | None:
    """Return what the window keeps of a step; None without a row."""
    record = view.record
    if not view.num_rows:
        return None
    cluster = min(max(view.num_rows / max(view.starts.size, 1), 1.0), MAX_CLUSTER)
    pairs, copies, repeats = _pairs(view)
    ids, low, share = record.mean_ids, record.mean_probabilities, record.mean_shares
    high = low + np.float32(record.mean_slack)
    rest = record.mean_rest if math.isfinite(record.mean_rest) else 1.0
    if ids.size:  # frequent targets that the mean prediction does not name
        targets, _, counts = view.distinct
        frequent = np.argsort(-counts, kind="stable")[:MAX_TARGETS]
        unnamed = frequent[~is_among(targets[frequent], np.sort(ids))]
        ids = np.concatenate([ids, targets[unnamed].astype(np.int32)])
        low = np.concatenate([low, np.zeros(unnamed.size, np.float32)])
        high = np.concatenate([high, np.full(unnamed.size, rest, np.float32)])
        share = np.concatenate([share, (counts[unnamed] / view.num_rows).astype(np.float32)])
    rows = float(record.seen_rows or view.num_rows)
    return _Pooled(rows, cluster, rest, ids, low, high, share, pairs, copies, repeats)


def _pairs(view: StepView) -> tuple[float, float, float]:
    """Count rows with one of the same answer before them, predictions that are its target, targets that are."""
    predictions = view.predictions
    if predictions is None:
        return 0.0, 0.0, 0.0
    targets = view.record.targets
    follows = ~view.begins[1:]
    copies = (predictions[1:] == targets[:-1]) & follows
    repeats = (targets[1:] == targets[:-1]) & follows
    return float(np.count_nonzero(follows)), float(np.count_nonzero(copies)), float(np.count_nonzero(repeats))
