"""Answers counted on the publisher's thread, from a copy of labels that are on the host anyway.

At a step with nothing due, the copy is all that the training thread does for them (docs/trainer.md, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sidestep.protocol.messages import Answers
from sidestep.trainer_hooks.reductions.answers import answers_message
from sidestep.trainer_hooks.reductions.runs import find_runs_on_host, targets_on_host

_HEAD = 3  # labelled positions, batches, batches without labels: the layout of reductions.answers.reduce_answers


@dataclass(frozen=True, slots=True)
class LabelReading:
    """How to read labels: the same for every micro-batch of a training."""

    shifted: bool
    ignore_index: int
    eos_id: int | None

    def counts(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """What ``reduce_answers`` says of these labels [b, t] or [t]: int64 [3 + t + 1]."""
        rows = labels if labels.ndim == 2 else labels[None]
        targets = targets_on_host(rows, self.ignore_index, shifted=self.shifted)
        runs = find_runs_on_host(targets, None, ignore_index=self.ignore_index, eos_id=self.eos_id)
        made = np.zeros(_HEAD + targets.shape[1] + 1, np.int64)
        made[:_HEAD] = runs.rows.size, 1, not runs.rows.size
        if runs.rows.size:
            lengths = np.bincount(runs.lengths())
            made[_HEAD : _HEAD + lengths.size] = lengths
        return made


class LateAnswers:
    """A step's answers, counted or still to be counted; makes its ``Answers``, one per epoch, when called.

    A step has micro-batches of several epochs where an epoch left some over (docs/metrics.md, ``data/``).
    """

    __slots__ = ("_copies", "_step", "counted", "size_bytes")

    def __init__(self, step: int) -> None:
        self._step = step
        self._copies: dict[int, list[tuple[LabelReading, NDArray[Any]]]] = {}
        self.counted: dict[str, torch.Tensor] = {}
        """What ``reduce_answers`` returned, added up where epoch, device and length are the same."""
        self.size_bytes = 0
        """Host memory of copied labels, held until the call."""

    def add(self, epoch: int, counted: torch.Tensor | None, copy: tuple[LabelReading, NDArray[Any]] | None) -> None:
        """Take a micro-batch in: what was ``counted`` of it, else a copy [b, t] of its labels that is nobody else's."""
        if counted is not None:
            self._copies.setdefault(epoch, [])
            name = f"{epoch}/{counted.device}/{counted.shape[0]}"
            before = self.counted.get(name)
            self.counted[name] = counted if before is None else before + counted
        if copy is not None:
            self._copies.setdefault(epoch, []).append(copy)
            self.size_bytes += copy[1].nbytes

    @property
    def num_messages(self) -> int:
        """How many messages the call makes: one per epoch."""
        return len(self._copies)

    def __call__(self, counted: Mapping[str, NDArray[Any]]) -> list[Answers]:
        """Count what is left; ``counted`` has the names of the attribute, and has arrived on the host."""
        return [self._of_epoch(epoch, counted) for epoch in sorted(self._copies)]

    def _of_epoch(self, epoch: int, counted: Mapping[str, NDArray[Any]]) -> Answers:
        arrays = {name: array for name, array in counted.items() if name.startswith(f"{epoch}/")}
        for place, (reading, labels) in enumerate(self._copies[epoch]):
            arrays[f"late_{place}"] = reading.counts(labels)
        return answers_message(step=self._step, epoch=epoch, arrays=arrays)
