"""Answers as runs of labelled positions: where each starts, and what of it stands before its first EOS.

The same rule twice: in fixed shapes for a device, and in numpy for labels that are still on the host, where many small
torch operations would cost more than the step may spend (docs/trainer.md, section 3). A property test holds them equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sidestep.protocol.messages import Role


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What each position is within its answer (docs/metrics.md, Conventions)."""

    starts: Tensor
    """True at the first labelled position of each run; bool [B, T]."""
    content: Tensor
    """True at labelled positions before their run's first EOS; bool [B, T]."""
    later: Tensor
    """True at the other labelled positions up to and with their run's first EOS; bool [B, T]."""
    origins: Tensor
    """At content positions, the index within the row at which the run starts, elsewhere any index; int64 [B, T]."""

    @cached_property
    def roles(self) -> Tensor:
        """The ``Role`` bits of every position; uint8 [B, T], 0 at positions without a role."""
        bits = self.later.to(torch.uint8) * int(Role.LATER) + self.starts.to(torch.uint8) * int(Role.FIRST)
        return bits + self.content.to(torch.uint8) * int(Role.CONTENT)


def find_runs(labelled: Tensor, ends: Tensor, breaks: Tensor | None) -> Runs:
    """Find the runs of labelled positions of each row, in fixed shapes on any device.

    Args:
        labelled: positions that count; bool [B, T].
        ends: positions whose target is the EOS; bool [B, T].
        breaks: positions whose target begins another document than the target before it; bool [B, T], or None.
    """
    before = F.pad(labelled, (1, -1))
    if breaks is not None:
        before = before & breaks.logical_not()
    starts = labelled & before.logical_not()
    # One running maximum of events tells both whether an EOS was seen in this run and where the run began:
    # a start at t writes the odd 2t + 1, a position after an EOS the even 2t, and the latest event is the largest.
    twice = torch.arange(0, 2 * labelled.shape[1], 2, device=labelled.device)
    after_end = F.pad(ends, (1, -1)) & labelled
    latest = torch.where(starts, twice + 1, twice * after_end).cummax(dim=1).values
    unended = labelled & (latest & 1).to(torch.bool)
    return Runs(
        starts=starts, content=unended & ends.logical_not(), later=unended & starts.logical_not(), origins=latest >> 1
    )


def content_lengths(runs: Runs) -> Tensor:
    """Count the answers of each content length; int64 [T + 1] on the runs' device."""
    rows, positions = runs.starts.shape
    lengths = torch.zeros((rows, positions), dtype=torch.int64, device=runs.starts.device)
    lengths.scatter_add_(1, runs.origins, runs.content.to(torch.int64))
    slots = torch.where(runs.starts, lengths, positions + 1).flatten()
    counts = torch.zeros(positions + 2, dtype=torch.int64, device=slots.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots)).narrow(0, 0, positions + 1)


@dataclass(frozen=True, kw_only=True)
class HostRuns:
    """The runs of a batch whose labels are on the host, as short lists."""

    rows: NDArray[np.int64]
    """Flat indices of the labelled positions, ascending [n]."""
    first: NDArray[np.int64]
    """Where in ``rows`` each run begins [answers]."""
    stop: NDArray[np.int64]
    """Where in ``rows`` each run ends, exclusive [answers]."""
    first_end: NDArray[np.int64]
    """Where in ``rows`` each run's first EOS stands; ``stop`` where it has none [answers]."""

    def lengths(self) -> NDArray[np.int64]:
        """Return the content length of each answer; int64 [answers]."""
        return self.first_end - self.first

    @cached_property
    def roles(self) -> NDArray[np.uint8]:
        """The ``Role`` bits of each labelled position; uint8 [n]."""
        size = self.rows.size
        index = np.arange(size)
        per_run = self.stop - self.first
        first_end = np.repeat(self.first_end, per_run)
        bits = np.where(index < first_end, np.uint8(Role.CONTENT), np.uint8(0))
        starts = np.zeros(size, np.bool_)
        starts[self.first] = True
        bits[starts] |= np.uint8(Role.FIRST)
        bits[~starts & (index <= first_end)] |= np.uint8(Role.LATER)
        return bits


def targets_on_host(labels: NDArray[Any], ignore_index: int, *, shifted: bool) -> NDArray[Any]:
    """Return the target of the logits at each position of labels [B, T]; where they are shifted, these themselves."""
    if shifted:
        return labels
    return np.concatenate((labels[:, 1:], np.full_like(labels[:, :1], ignore_index)), axis=1)


def find_runs_on_host(
    targets: NDArray[np.integer], breaks: NDArray[np.bool_] | None, *, ignore_index: int, eos_id: int | None
) -> HostRuns:
    """Find the runs of labelled positions of each row; ``targets`` and ``breaks`` are [B, T] as in ``find_runs``."""
    flat = targets.reshape(-1)
    rows = np.flatnonzero(flat != ignore_index)
    if not rows.size:
        none = np.zeros(0, np.int64)
        return HostRuns(rows=rows, first=none, stop=none, first_end=none)
    begins = np.empty(rows.size, np.bool_)
    begins[0] = True
    np.not_equal(rows[1:] - rows[:-1], 1, out=begins[1:])
    begins |= rows % targets.shape[1] == 0
    if breaks is not None:
        begins |= breaks.reshape(-1)[rows]
    first = np.flatnonzero(begins)
    stop = np.append(first[1:], rows.size)
    first_end = stop
    if eos_id is not None:
        ends = np.append(np.flatnonzero(flat[rows] == eos_id), rows.size)
        first_end = np.minimum(ends[np.searchsorted(ends, first)], stop)
    return HostRuns(rows=rows, first=first, stop=stop, first_end=first_end)
