"""Targets that do not come any more: what a part of the data was made of is gone.

Of each frequent target it is known how many of its kind a step has. Where none comes in so many rows that this cannot
be chance, a part of the data is missing: a shard, a task, a language, the ends of long answers. Rows of a step are not
drawn one by one, as where each step is of one task: what counts is how many *steps* would have had the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.data_rules import MissingTargets as Rule
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.token_table import find_ids
from sidestep.worker.detectors.view import StepView

MAX_IDS: Final = 256
"""Most frequent targets that are followed."""
LEAST_SHARE: Final = 1e-3
"""Share below which a target is let go of."""
DOUBTFUL: Final = 6.0
"""Expected comings in vain from which a target's share stands still: e to the -6 of chance."""
LET_GO: Final = 300.0
"""Expected comings in vain from which it is not missed any more: the data have become others."""
MOST_PRESENT: Final = 0.999
CLUSTER_RATE: Final = 0.05


class MissingTargets:
    """``targets_missing``: targets that used to come do not."""

    name = "missing_targets"

    def __init__(self, settings: DetectorSettings) -> None:
        self._rule: Rule = settings.targets_missing
        self._reset()

    def _reset(self) -> None:
        self._ids = np.zeros(0, np.int64)  # ascending
        self._shares = np.zeros(0)  # of the rows
        self._clusters = np.zeros(0)  # rows of a step that has any
        self._presence = np.zeros(0)  # share of the steps that have any
        self._missed = np.zeros(0)  # steps with one that were to be expected since the last one
        self._num_steps = 0

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        if not view.num_rows:
            return ()
        self._learn(view)
        rule = self._rule
        if self._num_steps < rule.warmup:
            return ()
        gone = self._missed >= rule.threshold
        share, number = float(self._shares[gone].sum()), int(np.count_nonzero(gone))
        evidence, token = "", -1
        if number:
            place = int(np.where(gone, self._shares, 0.0).argmax())
            token, steps = int(self._ids[place]), self._missed[place]
            evidence = (
                f"{number} targets that were {share:.1%} of all do not come any more; {{token}}, "
                f"{self._shares[place]:.1%} of them, should have come in {steps:.0f} steps since it last did"
            )
        is_beyond = number >= rule.least_ids and share >= rule.share
        return (
            Reading(
                name="targets_missing",
                value=share,
                limit=rule.share,
                is_beyond=is_beyond,
                token=token,
                evidence=evidence,
            ),
        )

    def _learn(self, view: StepView) -> None:
        ids, _, counts = view.distinct
        self._num_steps += 1
        rate = max(self._rule.rate, 1.0 / self._num_steps)
        _, places, known = find_ids(self._ids, ids)
        now = np.zeros(self._ids.size)
        now[places[known]] = counts[known]
        came = now > 0
        # Answers of a step are not drawn row by row, least of all where there is one: no more than such steps came.
        most = -np.log1p(-np.minimum(self._presence, MOST_PRESENT))
        expected = np.minimum(view.num_rows * self._shares / np.maximum(self._clusters, 1.0), most)
        is_known = self._num_steps > self._rule.warmup  # of the first steps shares are of chance
        self._missed = np.where(came | (not is_known), 0.0, self._missed + expected)
        moved = came | (self._missed < DOUBTFUL)
        self._shares += np.where(moved, rate * (now / view.num_rows - self._shares), 0.0)
        self._presence += np.where(moved, rate * (came - self._presence), 0.0)
        self._clusters += np.where(came, max(rate, CLUSTER_RATE) * (now - self._clusters), 0.0)
        self._put(
            np.concatenate([self._ids, ids[~known]]),
            np.concatenate([self._shares, rate * counts[~known] / view.num_rows]),
            np.concatenate([self._clusters, counts[~known].astype(np.float64)]),
            np.concatenate([self._presence, np.full(np.count_nonzero(~known), rate)]),
            np.concatenate([self._missed, np.zeros(np.count_nonzero(~known))]),
        )

    def _put(
        self,
        ids: NDArray[np.int64],
        shares: NDArray[np.float64],
        clusters: NDArray[np.float64],
        presence: NDArray[np.float64],
        missed: NDArray[np.float64],
    ) -> None:
        kept = np.flatnonzero((shares >= LEAST_SHARE) & (missed < LET_GO))
        if kept.size > MAX_IDS:
            kept = kept[np.argsort(-shares[kept], kind="stable")[:MAX_IDS]]
        kept = kept[np.argsort(ids[kept], kind="stable")]
        self._ids, self._shares, self._missed = ids[kept], shares[kept], missed[kept]
        self._clusters, self._presence = clusters[kept], presence[kept]

    def forget(self) -> None:
        """Learn anew what comes."""
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        arrays = (self._ids, self._shares, self._clusters, self._missed, self._presence)
        return {"steps": self._num_steps, "targets": [each.tobytes() for each in arrays]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._num_steps = int(state["steps"])
        ids, *numbers = state["targets"]
        self._ids = np.frombuffer(ids, "<i8").astype(np.int64)
        self._shares, self._clusters, self._missed, *more = (np.frombuffer(each, "<f8").copy() for each in numbers)
        self._presence = more[0] if more else np.ones(self._ids.size)
