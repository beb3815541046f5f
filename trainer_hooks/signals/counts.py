"""Exact counts over all positions of a batch, and hashes of its samples: what tells a broken data pipeline.

The same rules twice: in numpy for labels on the host, counted on the publisher's thread from copies, and in fixed
shapes for labels on a device. A test holds them equal. Names and meanings are those of ``SIGNAL_COUNTS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sidestep.protocol.messages import SIGNAL_COUNTS
from sidestep.protocol.signals import PAIRS_ALIKE
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.runs import HostRuns, find_runs_on_host, targets_on_host
from sidestep.trainer_hooks.signals.prompt_ends import count_prompt_ends, count_prompt_ends_on_device

NUM_COUNTS = len(SIGNAL_COUNTS)
_BEGIN = 3
"""Ids that tell whether a row begins twice: two beginnings, and what follows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How ids and labels are to be read: the same for every micro-batch of a training."""

    shifted: bool
    ignore_index: int
    eos_id: int | None
    pad_id: int | None
    prompt_end: tuple[int, ...] = ()
    """What all samples' prompts end with (``prompt_ends.py``)."""

    @property
    def pads_by_id(self) -> bool:
        """Whether the padding's id tells padding: where it is not the EOS as well."""
        return self.pad_id is not None and self.pad_id != self.eos_id

    def targets_and_runs(self, labels: NDArray[Any]) -> tuple[NDArray[Any], HostRuns]:
        """Return the target at each position of labels [B, T] on the host, and the answers among them."""
        targets = targets_on_host(labels, self.ignore_index, shifted=self.shifted)
        return targets, find_runs_on_host(targets, None, ignore_index=self.ignore_index, eos_id=self.eos_id)


def count_on_host(
    reading: Reading, labels: NDArray[Any], ids: NDArray[Any] | None, mask: NDArray[Any] | None
) -> NDArray[np.int64]:
    """Count a micro-batch.

    Args:
        reading: how to read it.
        labels: int [B, T], as the trainer gave them.
        ids: int [B, T], or None.
        mask: the attention mask, [B, T], or None.
    """
    targets, runs = reading.targets_and_runs(labels)
    return count_targets(reading, targets, runs, ids, mask)


def count_targets(
    reading: Reading,
    targets: NDArray[Any],
    runs: HostRuns,
    ids: NDArray[Any] | None,
    mask: NDArray[Any] | None,
) -> NDArray[np.int64]:
    """Count a micro-batch whose ``targets`` [B, T] and ``runs`` are known already (``Reading.targets_and_runs``)."""
    labelled = targets != reading.ignore_index
    real = None
    if mask is not None:
        real = mask != 0
    elif ids is not None and reading.pads_by_id:
        real = ids != reading.pad_id
    num_labelled = int(runs.rows.size)
    before_last = labelled[:, :-1]
    compared = equal = equal_next = 0
    if ids is not None:
        compared = int(np.count_nonzero(before_last))
        equal = int(np.count_nonzero(before_last & (targets[:, :-1] == ids[:, :-1])))
        equal_next = int(np.count_nonzero(before_last & (targets[:, :-1] == ids[:, 1:])))
    masked = int(np.count_nonzero(before_last & ~real[:, 1:])) if real is not None else 0
    counts = {
        "positions": targets.size,
        "padding": -1 if real is None else int(real.size - np.count_nonzero(real)),
        "compared": compared,
        "labelled": num_labelled,
        "labels_equal_ids": equal,
        "labels_equal_next_ids": equal_next,
        "labels_masked": masked,
        "answers": runs.first.size,
        "answers_with_eos": int(np.count_nonzero(runs.first_end < runs.stop)),
        "batches": 1,
        "batches_without_labels": int(not num_labelled),
        **_count_rows(labelled, ids, real),
        **_count_pairs(runs, ids),
        **count_prompt_ends(reading.prompt_end, ids, labelled, runs.first.size),
    }
    return np.array([counts[name] for name in SIGNAL_COUNTS], np.int64)


def _count_rows(labelled: NDArray[Any], ids: NDArray[Any] | None, real: NDArray[Any] | None) -> dict[str, int]:
    is_row = real.any(axis=1) if real is not None else np.ones(labelled.shape[0], bool)
    begun_twice = -1
    if ids is not None:
        begun_twice = 0
        if ids.shape[1] > _BEGIN:
            first = real.argmax(axis=1) if real is not None else np.zeros(ids.shape[0], np.int64)
            columns = np.minimum(first[:, None] + np.arange(_BEGIN), ids.shape[1] - 1)
            begin = np.take_along_axis(ids, columns, axis=1)
            begun_twice = int(np.count_nonzero(is_row & (begin[:, 0] == begin[:, 1]) & (begin[:, 1] != begin[:, 2])))
    return {
        "rows": int(np.count_nonzero(is_row)),
        "rows_without_labels": int(np.count_nonzero(is_row & ~labelled.any(axis=1))),
        "rows_begun_twice": begun_twice,
    }


def _count_pairs(runs: HostRuns, ids: NDArray[Any] | None) -> dict[str, int]:
    if ids is None:
        return {"answer_pairs": -1, **dict.fromkeys(PAIRS_ALIKE, -1)}
    starts = runs.rows[runs.first]
    starts = starts[starts % ids.shape[1] >= len(PAIRS_ALIKE) - 1]
    flat, here, other = ids.reshape(-1), starts[1:], starts[:-1]
    alike = {name: int(np.count_nonzero(flat[here - k] == flat[other - k])) for k, name in enumerate(PAIRS_ALIKE)}
    return {"answer_pairs": here.size, **alike}


def _count_pairs_on_device(starts: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    """Each start beside the one before it: the running maximum of the starts' places."""
    if ids is None:
        unknown = torch.full((), -1, dtype=torch.int64, device=starts.device)
        return {"answer_pairs": unknown, **dict.fromkeys(PAIRS_ALIKE, unknown)}
    columns = torch.arange(ids.shape[1], device=ids.device)
    is_start = (starts & (columns >= len(PAIRS_ALIKE) - 1)).flatten()
    places = torch.arange(is_start.shape[0], device=ids.device)
    newest = torch.where(is_start, places, -1).cummax(dim=0).values
    other = F.pad(newest, (1, -1), value=-1)
    is_pair, flat = is_start & (other >= 0), ids.flatten()
    alike = {
        name: (is_pair & (flat.roll(k) == flat.index_select(0, (other - k).clamp(min=0)))).sum()
        for k, name in enumerate(PAIRS_ALIKE)
    }
    return {"answer_pairs": is_pair.sum(), **alike}


def count_on_device(batch: AlignedBatch, prompt_end: Sequence[int] = ()) -> Tensor:
    """Count a micro-batch in fixed shapes; int64 [counts] on the labels' device."""
    labelled, device = batch.labelled, batch.labelled.device
    runs = batch.runs
    zero = torch.zeros((), dtype=torch.int64, device=device)
    last = labelled.shape[1] - 1
    before_last, targets = labelled.narrow(1, 0, last), batch.targets.narrow(1, 0, last)
    compared = equal = equal_next = zero
    if batch.input_ids is not None:
        compared = before_last.sum()
        equal = (before_last & (targets == batch.input_ids.narrow(1, 0, last))).sum()
        equal_next = (before_last & (targets == batch.input_ids.narrow(1, 1, last))).sum()
    real = batch.real if batch.padding_known else None
    labelled_total = labelled.sum()
    # An answer has an EOS where a position of it is past, or is, its first EOS: every run but those of content alone.
    ended = labelled & runs.content.logical_not()
    before = F.pad(ended, (1, -1)) & runs.starts.logical_not()
    answers = runs.starts.sum()
    counts = {
        "positions": zero + labelled.numel(),
        "padding": zero - 1 if real is None else real.logical_not().sum(),
        "compared": compared,
        "labelled": labelled_total,
        "labels_equal_ids": equal,
        "labels_equal_next_ids": equal_next,
        "labels_masked": zero if real is None else (before_last & real.narrow(1, 1, last).logical_not()).sum(),
        "answers": answers,
        "answers_with_eos": (ended & before.logical_not()).sum(),
        "batches": zero + 1,
        "batches_without_labels": (labelled_total == 0).to(torch.int64),
        **_count_rows_on_device(batch, real),
        **_count_pairs_on_device(runs.starts, batch.input_ids),
        **count_prompt_ends_on_device(prompt_end, batch.input_ids, labelled, answers),
    }
    return torch.stack([counts[name] for name in SIGNAL_COUNTS])


def _count_rows_on_device(batch: AlignedBatch, real: Tensor | None) -> dict[str, Tensor]:
    labelled, ids = batch.labelled, batch.input_ids
    is_row = real.any(dim=1) if real is not None else torch.ones_like(labelled.select(1, 0))
    begun_twice = is_row.sum() * 0 - int(ids is None)
    if ids is not None and ids.shape[1] > _BEGIN:
        first = real.to(torch.uint8).argmax(dim=1) if real is not None else torch.zeros_like(is_row, dtype=torch.int64)
        offsets = torch.arange(_BEGIN, device=ids.device)
        begin = ids.gather(1, (first.unsqueeze(1) + offsets).clamp(max=ids.shape[1] - 1))
        is_twice = (begin.select(1, 0) == begin.select(1, 1)) & (begin.select(1, 1) != begin.select(1, 2))
        begun_twice = (is_row & is_twice).sum()
    return {
        "rows": is_row.sum(),
        "rows_without_labels": (is_row & labelled.any(dim=1).logical_not()).sum(),
        "rows_begun_twice": begun_twice,
    }


def add_counts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add micro-batches' counts [m, counts]; what is not known once is not known."""
    total: NDArray[np.int64] = counts.sum(axis=0, dtype=np.int64)
    total[(counts < 0).any(axis=0)] = -1
    return total


# ---------------------------------------------------------------------------------------------------- hashes

_GOLDEN = 0x9E3779B97F4A7C15


def _weights(length: int, salt: int) -> NDArray[np.int64]:
    """Odd pseudo-random factors, one per position (splitmix64)."""
    value = (np.arange(1, length + 1, dtype=np.uint64) + np.uint64(salt)) * np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    weights: NDArray[np.int64] = ((value ^ (value >> np.uint64(31))) | np.uint64(1)).astype(np.int64)
    return weights


def hash_on_host(labels: NDArray[Any], ids: NDArray[Any] | None) -> NDArray[np.int64]:
    """Hash each row of a batch; int64 [B]."""
    with np.errstate(over="ignore"):
        hashes: NDArray[np.int64] = (labels.astype(np.int64) * _weights(labels.shape[1], 0)).sum(axis=1)
        if ids is not None:
            hashes += (ids.astype(np.int64) * _weights(ids.shape[1], 1 << 32)).sum(axis=1)
    return hashes


class DeviceHash:
    """The same on a device; the factors are sent there once per length."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(self, labels: Tensor, ids: Tensor | None) -> Tensor:
        """Hash each row of a batch; int64 [B] on the labels' device."""
        factors = self._factors(labels.device, labels.shape[1])
        hashes = (labels.to(torch.int64) * factors.select(0, 0)).sum(dim=1)
        if ids is None:
            return hashes
        factors = self._factors(labels.device, ids.shape[1])  # an encoder's ids have a length of their own
        return hashes + (ids.to(torch.int64) * factors.select(0, 1)).sum(dim=1)

    def _factors(self, device: torch.device, length: int) -> Tensor:
        held = self._held.get((device, length))
        if held is None:
            made = torch.from_numpy(np.stack((_weights(length, 0), _weights(length, 1 << 32))))
            held = (made.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else made).to(
                device, non_blocking=True
            )
            if len(self._held) >= _HELD_LENGTHS:
                self._held.clear()
            self._held[(device, length)] = held
        return held


_HELD_LENGTHS = 64
