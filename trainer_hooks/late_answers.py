"""Answers counted on the publisher's thread, from a copy of labels that are on the host anyway.

At a step with nothing due, the copy is all that the training thread does for them (docs/trainer.md, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sidestep.trainer_hooks.reductions.runs import find_runs_on_host

_HEAD = 3  # labelled positions, batches, batches without labels: the layout of reductions.answers.reduce_answers


@dataclass(frozen=True, slots=True)
class LateAnswers:
    """A copy of one micro-batch's labels, and how to read it."""

    labels: torch.Tensor
    """int [b, t], on the host, nobody else's."""
    shifted: bool
    ignore_index: int
    eos_id: int | None

    def counts(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """What ``reduce_answers`` says of these labels, once they are an array: int64 [3 + t + 1]."""
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
