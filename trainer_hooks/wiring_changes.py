"""Which ids of a micro-batch the probe of the wiring exchanges, and at which positions it looks for a change.

In fixed shapes and without a host read: all of it stays on the device of the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.host_index import to_device

MAX_ROWS = 512
"""Rows of a micro-batch that are looked at; and candidates of all rows together."""
MAX_PER_ROW = 64
"""Candidates of a row."""
MIN_APART_ROWS = 4
"""Rows of a micro-batch from which every second one is left as it is."""


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
    image_token_id: int | None = None

    @property
    def counted(self) -> Tensor:
        """Which candidates are there: a row without answers has none; bool, as ``candidates``."""
        return self._of_first_rows(self.is_answer).gather(1, self.candidates)

    @property
    def behind_images(self) -> Tensor:
        """Candidates that stand behind an image of their row; all where no image is seen in the ids at all.

        Then placeholders are not known, or have another id by mistake: which is to be found.
        """
        if self.image_token_id is None:
            return torch.ones_like(self.candidates, dtype=torch.bool)
        is_image = self.input_ids == self.image_token_id
        behind = self._of_first_rows(is_image.cumsum(dim=1)).gather(1, self.candidates) > 0
        return behind | is_image.any().logical_not()

    def has_images_by_rows(self, tiles: Sequence[int] | Tensor) -> Tensor:
        """Return whether rows have placeholders for just so many tiles, as many for each; bool []."""
        if self.image_token_id is None:
            return torch.zeros((), dtype=torch.bool, device=self.input_ids.device)
        placeholders = (self.input_ids == self.image_token_id).sum(dim=1)
        if isinstance(tiles, Tensor):
            given = tiles.to(placeholders.device, non_blocking=True)
        else:
            given = to_device(np.array(tiles, np.int64), placeholders.device)
        return (placeholders * given.sum() == placeholders.sum() * given).all() & (placeholders.sum() > 0)

    def around_last_image(self, tiles: Sequence[int], last_tiles: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return which candidates stand before all placeholders of a row's last image, and which behind; bool [b, k].

        Args:
            tiles: of each row [B]; a placeholder stands for as many tiles as any other.
            last_tiles: of these, tiles of its last image [B].
        """
        if self.image_token_id is None:
            raise ValueError("where images stand is not known")
        placeholders = (self.input_ids == self.image_token_id).cumsum(dim=1)
        total = _last(placeholders)
        device = self.input_ids.device
        earlier = to_device(np.array(tiles, np.int64) - np.array(last_tiles, np.int64), device).unsqueeze(1)
        others = total * earlier // to_device(np.maximum(np.array(tiles, np.int64), 1), device).unsqueeze(1)
        here = self._of_first_rows(placeholders).gather(1, self.candidates)
        has_last = self._of_first_rows(total > others)
        return (here <= self._of_first_rows(others)) & has_last, (here == self._of_first_rows(total)) & has_last

    def exchanged(self, position: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange all answer tokens behind one position of each chosen row for others.

        Args:
            position: int64 [b, 1], b as many rows as have candidates.
            chosen: bool [B].

        Returns:
            The new ids, int [B, T]; and in which of the rows one was exchanged, bool [b].
        """
        rows = position.shape[0]
        following = F.pad(self.input_ids, (-1, 1))
        columns = torch.arange(following.shape[1], device=following.device)
        is_later = self.is_answer & (columns >= F.pad(position, (0, 0, 0, following.shape[0] - rows)))
        put = torch.where(is_later & chosen.unsqueeze(1), self._others(following), following)
        is_exchanged = self._of_first_rows((put != following).any(dim=1))
        begin, rest = self.input_ids.narrow(1, 0, 1), put.narrow(1, 0, put.shape[1] - 1)
        return torch.cat((begin, rest), dim=1), is_exchanged

    def unpadded(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put answer tokens where the attention mask is 0; placeholders of images stay, as do rows with answers there.

        A mask that is 0 at answers is meant otherwise, or is wrong: then other tokens than padding would be changed.

        Args:
            mask: [B, T], on the device of the ids.

        Returns:
            The new ids, int [B, T]; and in which of the first rows one was replaced, bool [b].
        """
        is_padding = mask == 0
        is_padding = is_padding & (is_padding & self.is_answer).any(dim=1, keepdim=True).logical_not()
        if self.image_token_id is not None:
            is_padding = is_padding & (self.input_ids != self.image_token_id)
        put = torch.where(is_padding, self._others(self.input_ids), self.input_ids)
        return put, self._of_first_rows((put != self.input_ids).any(dim=1))

    def _others(self, ids: Tensor) -> Tensor:
        """Return another token for each of ``ids`` [B, T]; the same one where a row and the one above have no other.

        The row's first answer token, else its last, else the first of the row above.
        """
        places = self.is_answer.cumsum(dim=1)
        total = _last(places)
        first = _token_at(self.targets, self.is_answer & (places == 1))
        last = _token_at(self.targets, self.is_answer & (places == total))
        above = torch.where(total.roll(1, dims=0) > 0, first.roll(1, dims=0), first)
        has_answers = total > 0
        token = ids
        for candidate in (above, last, first):
            token = torch.where((candidate != ids) & has_answers, candidate, token)
        return token

    def _of_first_rows(self, values: Tensor) -> Tensor:
        return values.narrow(0, 0, self.candidates.shape[0])


def find_answers(ids: Tensor, aligned: AlignedBatch, image_token_id: int | None = None) -> Answers | None:
    """Find answer tokens in the ids.

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
    return Answers(
        input_ids=ids, targets=targets, is_answer=is_answer, candidates=candidates, image_token_id=image_token_id
    )


def spares_rows(ids: Tensor) -> bool:
    """Return whether some rows stay as they are: of a few none could be spared."""
    return ids.shape[0] >= MIN_APART_ROWS


def every_second(ids: Tensor) -> Tensor:
    """Return which rows are changed, bool [B]: of a few all."""
    rows = torch.arange(ids.shape[0], device=ids.device)
    return rows % 2 == 0 if spares_rows(ids) else rows >= 0


@dataclass(frozen=True, slots=True)
class Change:
    """How losses changed."""

    nats: Tensor
    """By how much, float32 []."""
    rows: Tensor
    """Rows in which they were looked at, int64 []."""

    def or_larger(self, other: Change) -> Change:
        """Return the larger one, of as many rows as either has."""
        return Change(torch.maximum(self.nats, other.nats), torch.maximum(self.rows, other.rows))


def nothing(device: torch.device) -> Change:
    """Return that of what was not looked at."""
    return Change(torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device))


def mean_change(plain: Tensor, other: Tensor, counted: Tensor, noise: Tensor | None = None) -> Change:
    """Return the mean absolute change of the counted losses, beyond ``noise`` [] if that is known.

    Args:
        plain: float32 [b, k].
        other: the same, with something changed.
        counted: bool [b, k]; of these, what is no finite number in either does not count.
        noise: nats [].
    """
    changes = (other - plain).abs()
    counted = counted & changes.isfinite()
    mean = torch.where(counted, changes, 0.0).sum() / counted.sum().clamp(min=1)
    beyond = mean if noise is None else (mean - noise).clamp(min=0)
    return Change(beyond, counted.any(dim=1).sum())


def largest_change(plain: Tensor, other: Tensor, counted: Tensor) -> Change:
    """Return the largest absolute change instead of the mean one."""
    changes = (other - plain).abs()
    counted = counted & changes.isfinite()
    return Change(torch.where(counted, changes, 0.0).max(), counted.any(dim=1).sum())


def median_largest_change(plain: Tensor, other: Tensor, counted: Tensor) -> Change:
    """Return the median over rows of the largest absolute change of each; rows without a counted loss do not count."""
    changes = (other - plain).abs()
    counted = counted & changes.isfinite()
    largest = torch.where(counted, changes, -1.0).max(dim=1).values
    is_row = counted.any(dim=1)
    middle = torch.where(is_row, largest, torch.nan).nanmedian()
    return Change(middle.nan_to_num(0.0), is_row.sum())


def _last(values: Tensor) -> Tensor:
    """Return the last column [B, 1]."""
    return values.narrow(1, values.shape[1] - 1, 1)


def _token_at(tokens: Tensor, here: Tensor) -> Tensor:
    """Return the token of each row's one place that is marked [B, 1]; any of it where none is."""
    return tokens.gather(1, here.to(torch.uint8).argmax(dim=1, keepdim=True))
