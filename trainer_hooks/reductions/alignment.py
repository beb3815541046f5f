"""What a batch says, position by position of its logits: the target there, whether it counts, and whose answer it is.

Everything downstream (tokens, loss, answers) reads an ``AlignedBatch``, so that the two label conventions, the three
ways of saying where documents begin, and the two ways of saying what padding is are settled here and nowhere else
(docs/metrics.md, Conventions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from sidestep.trainer_hooks.reductions.runs import HostRuns, Runs, find_runs, find_runs_on_host


@dataclass(frozen=True, kw_only=True)
class AlignedBatch:
    """One micro-batch, aligned with its logits; all tensors on one device.

    Its answers are found once, for all who ask. It does not outlive the call that made it.
    """

    input_ids: Tensor | None
    """int [B, T]; None where the trainer's ids do not go with its labels."""
    targets: Tensor
    """The id that the logits at each position are to predict, ``ignore_index`` where none; int [B, T]."""
    labelled: Tensor
    """bool [B, T]."""
    real: Tensor | None
    """Positions that are not padding; bool [B, T]. None: all are taken for real."""
    padding_known: bool
    """False where padding and EOS cannot be told apart (no mask, and pad == eos or no pad)."""
    new_documents: Tensor | None
    """Positions that begin a document; bool [B, T], or None where the trainer does not say."""
    ignore_index: int
    eos_id: int | None

    @property
    def on_host(self) -> bool:
        """Whether the labels lie in the host's memory, where their rows may be listed."""
        return self.targets.device.type == "cpu"

    @property
    def breaks(self) -> Tensor | None:
        """Positions whose TARGET begins a document; bool [B, T]."""
        return None if self.new_documents is None else _next_positions(self.new_documents, fill=False)

    @cached_property
    def runs(self) -> Runs:
        """The answers, in fixed shapes."""
        ends = self.targets == self.eos_id if self.eos_id is not None else torch.zeros_like(self.labelled)
        return find_runs(self.labelled, ends & self.labelled, self.breaks)

    @cached_property
    def runs_on_host(self) -> HostRuns:
        """The answers of a batch whose labels are on the host, as lists."""
        breaks = self.breaks
        return find_runs_on_host(
            self.targets.numpy(),
            None if breaks is None else breaks.numpy(),
            ignore_index=self.ignore_index,
            eos_id=self.eos_id,
        )


def align(
    *,
    input_ids: Tensor | None,
    labels: Tensor | None,
    attention_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    shifted: bool = False,
    ignore_index: int = -100,
    pad_id: int | None = None,
    eos_id: int | None = None,
) -> AlignedBatch:
    """Align a batch with its logits, without reading device data.

    Args:
        input_ids: int [B, T] or [T].
        labels: int, the same shape; None counts as a batch without one labelled position.
        attention_mask: [B, T] or [T], non-zero at real positions; a mask with another number of axes counts as none.
        documents: a number per document at each position; int, shaped like the labels.
        cu_seqlens: cumulated lengths of the documents over the flattened positions; int [documents + 1].
        position_ids: positions that start anew with each document; int, shaped like the labels, or [k, B, T] of which
            the first is read (multi-axis rotary positions). The first of these three that is given counts.
        shifted: True where ``labels[t]`` is the target of ``logits[t]``; False where it is that of ``logits[t - 1]``
            (the label at index 0 then has no loss and is dropped).
        ignore_index: the label of positions that do not count.
        pad_id: the padding's id, read where there is no mask.
        eos_id: the id that ends an answer.

    Raises:
        ValueError: there is neither ids nor labels, or their shapes differ.
    """
    if input_ids is None and labels is None:
        raise ValueError("a batch needs input_ids or labels")
    if input_ids is not None and labels is not None and input_ids.shape != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not go with input_ids {tuple(input_ids.shape)}")
    device = _meeting_place(labels, input_ids, attention_mask, documents, cu_seqlens, position_ids)
    ids = None if input_ids is None else _beside(_two_axes(input_ids), device)
    if labels is not None:
        targets = _targets(_beside(labels, device), shifted=shifted, ignore_index=ignore_index)
    else:
        targets = torch.full_like(cast("Tensor", ids), ignore_index)
    shape = targets.shape
    real, padding_known = _real_positions(ids, attention_mask, shape, device, pad_id=pad_id, eos_id=eos_id)
    return AlignedBatch(
        input_ids=ids,
        targets=targets,
        labelled=targets != ignore_index,
        real=real,
        padding_known=padding_known,
        new_documents=_new_documents(documents, cu_seqlens, position_ids, shape, device),
        ignore_index=ignore_index,
        eos_id=eos_id,
    )


def _targets(labels: Tensor, *, shifted: bool, ignore_index: int) -> Tensor:
    """Return the target of the logits at each position; [B, T] of the labels' dtype."""
    labels = _two_axes(labels)
    return labels if shifted else _next_positions(labels, fill=ignore_index)


def _real_positions(
    ids: Tensor | None,
    mask: Tensor | None,
    shape: torch.Size,
    device: torch.device,
    *,
    pad_id: int | None,
    eos_id: int | None,
) -> tuple[Tensor | None, bool]:
    """Return the real positions, and whether padding is known at all."""
    if mask is not None and mask.dim() in {1, 2} and mask.numel() == shape.numel():
        return _beside(mask.reshape(shape), device) != 0, True
    if ids is None or pad_id is None or pad_id == eos_id:
        return None, False
    return ids != pad_id, True


def _new_documents(
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    shape: torch.Size,
    device: torch.device,
) -> Tensor | None:
    """Return the positions that begin a document; index 0 of a row is one by nature and is left out."""
    if documents is not None:
        ids = _beside(documents.reshape(shape), device)
        return _changes(ids, torch.ne)
    if cu_seqlens is not None:
        size = shape.numel()
        places = _beside(cu_seqlens, device).to(torch.int64).clamp(0, size)
        flags = torch.zeros(size + 1, dtype=torch.int64, device=device).scatter_add_(0, places, torch.ones_like(places))
        return _but_first(flags.narrow(0, 0, size).view(shape) > 0)
    if position_ids is not None:
        ids = position_ids.select(0, 0) if position_ids.dim() == 3 else position_ids
        ids = _beside(ids.expand(shape), device)
        # Image positions may stand still; only a way back, or a document of one position, begins a document.
        return _changes(ids, torch.lt) | _but_first(ids == 0)
    return None


def _meeting_place(*values: Tensor | None) -> torch.device:
    """Return where the batch is aligned: on the host if all of it is there, else on the device that has a part of it.

    Never the other way round: bringing a device's tensor to the host would wait for the device.
    """
    devices = [each.device for each in values if each is not None]
    return next((device for device in devices if device.type != "cpu"), devices[0])


def _next_positions(values: Tensor, *, fill: int | bool) -> Tensor:
    """Return at each position what stands at the next one, and ``fill`` at a row's last."""
    return F.pad(values, (-1, 1), value=fill)


def _changes(values: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compare each value with the one before it; False at a row's first."""
    last = values.shape[1] - 1
    return F.pad(compare(values.narrow(1, 1, last), values.narrow(1, 0, last)), (1, 0))


def _but_first(flags: Tensor) -> Tensor:
    """Return the flags with every row's first set to False."""
    return F.pad(flags.narrow(1, 1, flags.shape[1] - 1), (1, 0))


def _two_axes(values: Tensor) -> Tensor:
    """Return [B, T] values, also for a batch without a row axis."""
    return values.unsqueeze(0) if values.dim() == 1 else values


def _beside(values: Tensor, device: torch.device) -> Tensor:
    """Return the values on a device; going to one never waits for it."""
    return values.detach().to(device, non_blocking=True)
