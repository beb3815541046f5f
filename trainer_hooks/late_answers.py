"""Answers counted on the publisher's thread, from a copy of labels that are on the host anyway.

At a step with nothing due, the copy is all that the training thread does for them (docs/trainer.md, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sidestep.protocol.messages import Answers
from sidestep.trainer_hooks.reductions.answers import answers_message
from sidestep.trainer_hooks.reductions.runs import find_runs_on_host

_HEAD = 3  # labelled positions, batches, batches without labels: the layout of reductions.answers.reduce_answers


@dataclass(frozen=True, slots=True)
class LabelReading:
    """How to read labels: the same for every micro-batch of a training."""

    shifted: bool
    ignore_index: int
    eos_id: int | None

    def counts(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """What ``reduce_answers`` says of these labels [b, t] or [t]: int64 [3 + t + 1]."""
        targets = labels if labels.ndim == 2 else labels[None]
        if not self.shifted:
            filler = np.full((targets.shape[0], 1), self.ignore_index, targets.dtype)
            targets = np.concatenate((targets[:, 1:], filler), axis=1)
        runs = find_runs_on_host(targets, None, ignore_index=self.ignore_index, eos_id=self.eos_id)
        made = np.zeros(_HEAD + targets.shape[1] + 1, np.int64)
        made[:_HEAD] = runs.rows.size, 1, not runs.rows.size
        if runs.rows.size:
            lengths = np.bincount(runs.lengths())
            made[_HEAD : _HEAD + lengths.size] = lengths
        return made


class LateAnswers:
    """Copies of a step's labels, and how to read each; makes the step's ``Answers`` when called."""

    __slots__ = ("_copies", "_epoch", "_step", "size_bytes")

    def __init__(self, step: int, epoch: int, copies: Sequence[tuple[LabelReading, torch.Tensor]]) -> None:
        """Hold ``copies`` [b, t] on the host, which are nobody else's."""
        self._step, self._epoch, self._copies = step, epoch, copies
        self.size_bytes = sum([labels.nbytes for _, labels in copies])
        """Host memory that is held until the call."""

    def __call__(self, counted: Mapping[str, NDArray[Any]]) -> Answers:
        """Count, and add what was ``counted`` before."""
        late = {f"late_{place}": reading.counts(labels.numpy()) for place, (reading, labels) in enumerate(self._copies)}
        return answers_message(step=self._step, epoch=self._epoch, arrays={**counted, **late})
