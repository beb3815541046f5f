"""A step's record as the families read it: rows in double precision, answers and content told apart, made once."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sidestep.worker.metrics.sequences import GeneratedSamples
from sidestep.worker.records import RunContext
from sidestep.worker.step_record import StepRecord

MIN_ANSWERS_TO_LEARN = 4
"""Answers from which the id that ends them is told from them, where no EOS is known."""
TERMINAL_SHARE = 0.9
"""Share of a step's answers that an id must end to be their end."""


class StepView:
    """What a family needs of a step.

    Args:
        record: the step.
        context: what the run's tables say, for generated samples and their targets.
        generated: what was generated at the step, if anything.
    """

    def __init__(
        self, record: StepRecord, context: RunContext | None = None, generated: GeneratedSamples | None = None
    ) -> None:
        self.record = record
        self.context = context
        self.generated = generated
        self.knowledge: float | None = None
        """What the model usually knows beyond counting its targets, in nats; set by the prior's detectors."""
        self.target_cost: float | None = None
        """What the targets cost by counting them at their places, in nats a row; set by the prior's detectors."""
        self.weights_moved: float | None = None
        """Largest move of a sampled weight at this step, in parts of the usual one; set by the weights' detectors."""
        self.update_size: float | None = None
        """Mean move of the sampled weights for their rate, in parts of the usual one; set by the weights' detectors."""
        self.residuals: NDArray[np.float64] | None = None
        """Loss of each row minus what its target usually costs [n]; set by the composition's detectors."""
        self.residual_deviations: float | None = None
        """How far the mean of ``residuals`` is above its usual level, in its standard deviations; by the same."""

    @property
    def num_rows(self) -> int:
        """Rows of the record."""
        return int(self.record.targets.size)

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """Loss of each row in nats [n]."""
        return self.record.losses.astype(np.float64)

    @cached_property
    def entropies(self) -> NDArray[np.float64] | None:
        """Entropy of each row in nats [n]; None where unknown."""
        return self.record.entropies.astype(np.float64) if self.record.entropies.size == self.num_rows > 0 else None

    @cached_property
    def mean_loss(self) -> float:
        """Mean of the rows' losses; there is a row."""
        return float(self.losses.mean())

    @cached_property
    def mean_entropy(self) -> float | None:
        """Mean of the rows' entropies; None where unknown."""
        return float(self.entropies.mean()) if self.entropies is not None else None

    @cached_property
    def distinct(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Distinct target ids, ascending [k]; which of them each row has [n]; how many rows have each [k]."""
        ids, which = np.unique(self.record.targets, return_inverse=True)
        which = which.reshape(-1)
        return ids.astype(np.int64), which, np.bincount(which, minlength=ids.size)

    @property
    def predictions(self) -> NDArray[np.int32] | None:
        """Most probable id of each row [n]; None where unknown."""
        return self.record.predictions if self.record.predictions.size == self.num_rows > 0 else None

    @cached_property
    def begins(self) -> NDArray[np.bool_]:
        """Which rows begin an answer; a rank's first row does [n]."""
        begins: NDArray[np.bool_] = self.record.places == 0
        sizes = self.record.rank_rows
        ranks = np.cumsum(sizes) - sizes
        begins[ranks[ranks < begins.size]] = True
        return begins

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First row of each answer [a]."""
        return np.flatnonzero(self.begins)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Rows of each answer [a]."""
        return np.concatenate([self.starts[1:], [self.num_rows]])[: self.starts.size] - self.starts

    @cached_property
    def answers(self) -> NDArray[np.int64]:
        """Number of the answer that each row belongs to [n]."""
        return np.cumsum(self.begins) - 1

    @cached_property
    def content(self) -> NDArray[np.bool_]:
        """Rows before their answer's first EOS; without an EOS, those that are not the id that ends the answers [n]."""
        if not self.num_rows:
            return np.zeros(0, np.bool_)
        ends = self.record.targets == self._terminal
        before = np.cumsum(ends) - ends
        is_content: NDArray[np.bool_] = ~ends & (before == before[self.starts][self.answers])
        return is_content

    @cached_property
    def num_content(self) -> int:
        """How many rows are content."""
        return int(np.count_nonzero(self.content))

    @cached_property
    def content_targets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Distinct targets of the content rows, most frequent first, and how many rows have each [k]."""
        ids, which, _ = self.distinct
        counts = np.bincount(which[self.content], minlength=ids.size)
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return ids[order], counts[order]

    @cached_property
    def _terminal(self) -> int:
        """EOS where answers hold it, else the id that ends nearly all of them, else none."""
        eos = self.record.eos_id
        if eos >= 0 and (self.record.targets == eos).any():
            return eos
        last = self.record.targets[self.starts + self.lengths - 1]
        if last.size < MIN_ANSWERS_TO_LEARN:
            return -1
        ids, counts = np.unique(last, return_counts=True)
        return int(ids[counts.argmax()]) if counts.max() > TERMINAL_SHARE * last.size else -1

    @cached_property
    def loss_error(self) -> float:
        """Standard error of the mean loss, in nats, as that of answers, whose tokens err together; there is a row."""
        deviations = self.sum_by_answer(self.losses - self.mean_loss)
        return math.sqrt(float(np.square(deviations).sum())) / self.num_rows

    @property
    def squared_loss_error(self) -> float:
        """Square of ``loss_error``; 0 where the rows are all that there are: their mean has no error."""
        return 0.0 if self.record.seen_rows >= self.record.labelled else self.loss_error**2

    def sum_by_answer(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of ``values`` [n] over each answer [a]."""
        return np.add.reduceat(values, self.starts) if self.starts.size else np.zeros(0)
