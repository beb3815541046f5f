"""Whether a position sees the tokens that follow it: the loss there as it is, and with all later answers exchanged.

A causal mask that is lost lets every position read the answer that it is to give: the training's loss falls to nothing,
and what is learnt is to copy (docs/detection.md). In a causal model nothing changes, to the last bit. It costs two
forwards of one micro-batch on its own interval, on rank 0, in the mode that the model is trained in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.protocol.messages import Message, Probe
from sidestep.trainer_hooks.capture import Batch, ForwardReader, ids_argument
from sidestep.trainer_hooks.isolation import Autocast, as_trained, autocast_now
from sidestep.trainer_hooks.kept_batch import KeptBatch, Ran, forward_logits
from sidestep.trainer_hooks.parameters import unwrapped
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.cross_entropy import cross_entropy

FIRST_STEP = 10
"""Probed whatever the interval is: a mask that is lacking from the start is found at once."""
MAX_ROWS = 512
"""Rows of a micro-batch that are looked at, one position each."""
MAX_FAILURES = 3
"""Exceptions after which it is switched off."""


class FutureProbe:
    """Keeps one micro-batch of a due step until the step has ended, and looks at it twice."""

    name = "future_probe"

    def __init__(self, model: nn.Module, reader: ForwardReader, interval: int) -> None:
        """Probe at ``FIRST_STEP`` and at half of every ``interval`` steps; 0: never."""
        self._model = unwrapped(model)
        self._reader = reader
        self._interval = interval
        self._kept = KeptBatch()
        self._autocast: Autocast = ()
        self._failures = 0
        self._without_labels = False
        config = getattr(self._model, "config", None)
        if getattr(config, "is_encoder_decoder", False) is True:
            self._interval = 0  # every position of an encoder sees all others, as it should

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is probed."""
        interval = self._interval
        return interval > 0 and step > 0 and (step == FIRST_STEP or step % interval == interval // 2)

    def see(self, given: Mapping[str, Any]) -> None:
        """Keep the arguments of a due step's first forward that has token ids."""
        if self._kept.is_empty and ids_argument(given) is not None:
            self._kept.see(given)
            self._autocast = autocast_now(self._model)

    def keep(self, batch: Batch, align: Callable[[Batch], AlignedBatch]) -> None:
        """Take the labels that belong to what was seen."""
        self._kept.keep(batch, align)

    def run(self, step: int) -> Ran | None:
        """Look at what was kept, and let go of it; None where nothing was, or it can tell nothing.

        Raises:
            Exception: whatever the model's forward raises; after ``MAX_FAILURES`` of them no step is due any more.
        """
        taken = self._kept.take()
        if taken is None:
            return None
        try:
            return self._run(step, *taken)
        except Exception:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                self._interval = 0
            raise

    def _run(self, step: int, given: dict[str, Any], aligned: AlignedBatch) -> Ran | None:
        began = time.perf_counter()
        name = ids_argument(given)
        other = exchanged(given[name], aligned) if name is not None else None
        if name is None or other is None:
            return None
        plain = self._losses(given, aligned, other.positions)
        changed = None if plain is None else self._losses({**given, name: other.input_ids}, aligned, other.positions)
        if plain is None or changed is None:
            self._interval = 0  # no logits in any way: nothing can be told of this model
            return None
        counted = other.counted.to(plain.device) & plain.isfinite() & changed.isfinite()
        rows = counted.sum()
        change = torch.where(counted, (changed - plain).abs(), 0.0).sum() / rows.clamp(min=1)
        seconds = time.perf_counter() - began

        def finish(arrays: Mapping[str, Any]) -> Sequence[Message]:
            return (
                Probe(
                    step=step,
                    loss=math.nan,
                    rolled_loss=math.nan,
                    labelled=0,
                    images=0,
                    seconds=seconds,
                    future_rows=int(arrays["rows"]),
                    future_change=float(arrays["change"]),
                ),
            )

        return {"change": change, "rows": rows}, finish

    def _losses(self, given: Mapping[str, Any], aligned: AlignedBatch, positions: Tensor) -> Tensor | None:
        """Return the loss at one position of each row, float32 [b]; None where the forward shows no logits.

        A fused loss has no logits while there are labels: then it is asked without them.
        """
        labels = self._reader.label_argument
        if self._without_labels:
            given = {name: value for name, value in given.items() if name != labels}
        with as_trained(self._model, self._autocast):
            source = forward_logits(self._model, self._reader, given, aligned)
        if source is None:
            if self._without_labels or labels not in given:
                return None
            self._without_labels = True
            return self._losses(given, aligned, positions)
        rows = torch.arange(positions.shape[0], device=source.device)
        here = positions.to(aligned.targets.device)
        targets = aligned.targets.narrow(0, 0, here.shape[0]).gather(1, here.unsqueeze(1)).squeeze(1)
        return cross_entropy(source, rows, positions.to(source.device), targets.to(source.device, torch.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """A batch with its later answers exchanged, on the device of its ids."""

    input_ids: Tensor
    """int [B, T]"""
    positions: Tensor
    """Of each row the position after which all answer tokens are others; int64 [min(B, MAX_ROWS)]."""
    counted: Tensor
    """Rows in which one was exchanged; bool, the same shape."""


def exchanged(ids: Tensor, aligned: AlignedBatch) -> Exchanged | None:
    """Exchange the second half of each row's answer tokens for others; no host read, fixed shapes.

    A token is exchanged where it stands right behind a labelled position and is that position's target, so that
    placeholders of images and padding stay; for the row's first such token, else for its last, else for the next row's
    first. The position looked at is the one in front of the first that is exchanged.

    Returns:
        None where the ids do not go with the labels, or lie on the host and the labels do not.
    """
    if ids.shape != aligned.targets.shape or (ids.is_cpu and not aligned.on_host):
        return None
    targets = aligned.targets.to(ids.device, ids.dtype, non_blocking=True)
    labelled = aligned.labelled.to(ids.device, non_blocking=True)
    following = F.pad(ids, (-1, 1))
    is_answer = labelled & (following == targets)
    is_answer[:, -1] = False
    places = is_answer.cumsum(dim=1)
    total = places[:, -1:]
    middle = (total + 1) // 2
    is_later = is_answer & (places >= middle)
    first = _token_at(targets, is_answer & (places == 1))
    last = _token_at(targets, is_answer & (places == total))
    has_answer = total > 0
    beside = torch.where(has_answer.roll(1, dims=0), first.roll(1, dims=0), first)
    token = following
    for candidate in (beside, last, first):
        token = torch.where(candidate == following, token, candidate)
    put = torch.where(is_later, token, following)
    rows = min(ids.shape[0], MAX_ROWS)
    return Exchanged(
        input_ids=torch.cat((ids[:, :1], put[:, :-1]), dim=1),
        positions=(is_answer & (places == middle)).to(torch.uint8).argmax(dim=1).narrow(0, 0, rows),
        counted=(put != following).any(dim=1).narrow(0, 0, rows),
    )


def _token_at(tokens: Tensor, here: Tensor) -> Tensor:
    """Return the token of each row's one place that is marked [B, 1]; any of it where none is."""
    return tokens.gather(1, here.to(torch.uint8).argmax(dim=1, keepdim=True))
