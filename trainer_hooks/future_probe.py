"""Whether a position sees the tokens that follow it: its loss as it is, and with all later answer tokens exchanged.

A causal mask that is lost lets every position read the answer that it is to give: the training's loss falls to nothing,
and what is learnt is to copy (docs/detection.md). In a causal model nothing changes, to the last bit. It costs two
forwards of one micro-batch on its own interval (the first time three), on rank 0, in the mode that is trained in.
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
"""Rows of a micro-batch that are looked at, one position each; and candidates for these positions."""
MAX_PER_ROW = 16
"""Candidates of a row; the one with the highest loss is taken, as what is certain anyway tells nothing."""
NOISE_FACTOR = 4.0
"""Of the change between two equal forwards, taken off: where a kernel adds in another order each time, it is not 0."""
MAX_FAILURES = 3
"""Exceptions after which it is switched off."""


class FutureProbe:
    """Keeps one micro-batch of a due step until the step has ended, and looks at it twice."""

    name = "future_probe"

    def __init__(
        self, model: nn.Module, reader: ForwardReader, interval: int, *, image_token_id: int | None = None
    ) -> None:
        """Probe ``FIRST_STEP`` steps after the first one and at half of every ``interval`` steps; 0: never."""
        self._model = unwrapped(model)
        self._reader = reader
        self._began: int | None = None
        self._interval = interval
        self._image_token_id = image_token_id
        self._kept = KeptBatch()
        self._autocast: Autocast = ()
        self._failures = 0
        self._without_labels = False
        self._noise: Tensor | None = None
        config = getattr(self._model, "config", None)
        if getattr(config, "is_encoder_decoder", False) is True:
            self._interval = 0  # every position of an encoder sees all others, as it should

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is probed: soon after the first one, that of a start or of a resume, and at intervals."""
        interval = self._interval
        if self._began is None:
            self._began = step
        return interval > 0 and step > 0 and (step == self._began + FIRST_STEP or step % interval == interval // 2)

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
        answers = find_answers(given[name], aligned, self._image_token_id) if name is not None else None
        if name is None or answers is None:
            return None
        seen = self._losses(given, aligned, answers, answers.candidates)
        if seen is None:
            self._interval = 0  # no logits in any way: nothing can be told of this model
            return None
        plain, best = torch.where(seen.isfinite(), seen, -1.0).max(dim=1)
        position = answers.candidates.gather(1, best.to(answers.candidates.device).unsqueeze(1))
        other, is_exchanged = answers.exchanged(position)
        counted = is_exchanged.to(plain.device) & (plain >= 0)
        change, rows = _change(plain, self._losses({**given, name: other}, aligned, answers, position), counted)
        if self._noise is None:
            self._noise = _change(plain, self._losses(given, aligned, answers, position), counted)[0]
        beyond = (change - NOISE_FACTOR * self._noise).clamp(min=0)
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

        return {"change": beyond, "rows": rows}, finish

    def _losses(
        self, given: Mapping[str, Any], aligned: AlignedBatch, answers: Answers, positions: Tensor
    ) -> Tensor | None:
        """Return the losses at positions [b, k] of the first rows, float32 [b, k]; None where there are no logits.

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
            return self._losses(given, aligned, answers, positions)
        targets = answers.targets.narrow(0, 0, positions.shape[0]).gather(1, positions)
        rows = torch.arange(positions.shape[0], device=source.device).unsqueeze(1).expand(positions.shape)
        here = positions.to(source.device)
        wanted = targets.to(source.device, torch.int64)
        return cross_entropy(source, rows.flatten(), here.flatten(), wanted.flatten()).view(positions.shape)


def _change(plain: Tensor, other: Tensor | None, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean absolute change [] of counted rows whose new loss is finite, and how many these are []."""
    if other is None:
        raise ValueError("a second forward shows no logits, though the first one did")
    changes = (other.squeeze(1) - plain).abs()
    counted = counted & changes.isfinite()
    rows = counted.sum()
    return torch.where(counted, changes, 0.0).sum() / rows.clamp(min=1), rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Where the answer tokens of a micro-batch stand in its ids; all on the device of the ids."""

    input_ids: Tensor
    """int [B, T]"""
    targets: Tensor
    """int [B, T]"""
    is_answer: Tensor
    """Labelled positions right behind which their target stands; bool [B, T]."""
    candidates: Tensor
    """Some of them in each of the first rows, evenly spread; int64 [min(B, MAX_ROWS), at most MAX_PER_ROW]."""

    def exchanged(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange all answer tokens behind one position of each row for others.

        For the row's first answer token, else for its last, else for the first of the row above.

        Args:
            position: int64 [b, 1], b as many rows as have candidates.

        Returns:
            The new ids, int [B, T]; and in which of the rows one was exchanged, bool [b].
        """
        rows = position.shape[0]
        following = F.pad(self.input_ids, (-1, 1))
        places = self.is_answer.cumsum(dim=1)
        total = _last(places)
        first = _token_at(self.targets, self.is_answer & (places == 1))
        last = _token_at(self.targets, self.is_answer & (places == total))
        above = torch.where(total.roll(1, dims=0) > 0, first.roll(1, dims=0), first)
        token = following
        for candidate in (above, last, first):
            token = torch.where(candidate == following, token, candidate)
        columns = torch.arange(following.shape[1], device=following.device)
        is_later = self.is_answer & (columns >= F.pad(position, (0, 0, 0, following.shape[0] - rows)))
        put = torch.where(is_later, token, following)
        is_exchanged = (put != following).any(dim=1).narrow(0, 0, rows)
        begin, rest = self.input_ids.narrow(1, 0, 1), put.narrow(1, 0, put.shape[1] - 1)
        return torch.cat((begin, rest), dim=1), is_exchanged


def find_answers(ids: Tensor, aligned: AlignedBatch, image_token_id: int | None = None) -> Answers | None:
    """Find answer tokens in the ids, in fixed shapes and without a host read.

    Only what stands right behind a labelled position and is its target counts: padding stays, and so do placeholders of
    images, also where they are labelled by mistake.

    Returns:
        None where the ids do not go with the labels, are none, or lie on the host and the labels do not.
    """
    if ids.shape != aligned.targets.shape or not ids.numel() or (ids.is_cpu and not aligned.on_host):
        return None
    targets = aligned.targets.to(ids.device, ids.dtype, non_blocking=True)
    is_answer = aligned.labelled.to(ids.device, non_blocking=True) & (F.pad(ids, (-1, 1)) == targets)
    is_answer = F.pad(is_answer.narrow(1, 0, ids.shape[1] - 1), (0, 1))  # nothing stands behind a row's last position
    if image_token_id is not None:
        is_answer = is_answer & (targets != image_token_id)
    rows = min(ids.shape[0], MAX_ROWS)
    places = is_answer.narrow(0, 0, rows).cumsum(dim=1)
    per_row = max(1, min(MAX_PER_ROW, MAX_ROWS // rows))
    ranks = 1 + torch.arange(per_row, device=ids.device) * _last(places) // per_row
    candidates = torch.searchsorted(places, ranks).clamp(max=ids.shape[1] - 1)
    return Answers(input_ids=ids, targets=targets, is_answer=is_answer, candidates=candidates)


def _last(values: Tensor) -> Tensor:
    """Return the last column [B, 1]."""
    return values.narrow(1, values.shape[1] - 1, 1)


def _token_at(tokens: Tensor, here: Tensor) -> Tensor:
    """Return the token of each row's one place that is marked [B, 1]; any of it where none is."""
    return tokens.gather(1, here.to(torch.uint8).argmax(dim=1, keepdim=True))
