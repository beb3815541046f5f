"""Images of a tensor in the place of others: which parts of it are one image, and which may stand for which.

What belongs to single images tells it: how large each is (``image_sizes``), how its tiles lie (``aspect_ratio_ids``),
how many patches it has (``image_grid_thw``, ``spatial_shapes``). An image goes into the place of one that is like it
in this, so that it stands for as many tokens; only where none is, into any other's. Images that pad a batch (all
zeros) stay where they are: models leave them out, and to move them may leave the order of the others as it was. All of
this is done in fixed shapes and without a host read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sidestep.trainer_hooks.capture import ids_argument
from sidestep.trainer_hooks.signals.images import find_images, image_numbers
from sidestep.trainer_hooks.signals.packed_images import PackedImages, packed_images

MAX_IMAGES = 4_096
"""More are not exchanged: they are compared by pairs."""
_IMAGE_AXES = 3
_MASK = "pixel_attention_mask"
_KINDS = {"image_sizes": 1, "spatial_shapes": 1, "image_grid_thw": 1, "aspect_ratio_ids": 2}
"""Arguments that say of each image what kind it is, and how many axes of theirs count images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """The images of a forward, of which each may be put into the place of another."""

    name: str
    value: Tensor | PackedImages
    axes: int
    """Leading axes of the tensor that count images."""
    rows: int
    """Rows of the batch; 0 where they are not known."""
    kinds: Tensor
    """What an image must be alike in to stand for as many tokens, int64 [n, k]."""
    is_real: Tensor
    """Which do not only fill the batch up, bool [n]."""
    follow: Mapping[str, Tensor] = field(default_factory=dict)
    """Arguments that go with the images, by the same axes."""

    @property
    def number(self) -> int:
        """How many images there are, those that fill up included."""
        return self.is_real.shape[0]

    @property
    def by_rows(self) -> int:
        """How many images each row of the batch has a place for; 0 where that is not known."""
        is_known = self.rows > 0 and (self.number == self.rows if self.axes == 1 else self._leading == self.rows)
        return self.number // self.rows if is_known else 0

    @property
    def _leading(self) -> int:
        return self.number if isinstance(self.value, PackedImages) else self.value.shape[0]

    def tokens_by_rows(self) -> Tensor:
        """Return how many images each row has, those of patches weighed by these; int64 [rows]."""
        weights = (
            self.value.lengths
            if isinstance(self.value, PackedImages)
            else torch.ones_like(self.is_real, dtype=torch.int64)
        )
        return torch.where(self.is_real, weights.to(self.is_real.device), 0).view(self.rows, -1).sum(dim=1)

    def exchanged(self, chosen: Tensor | None = None) -> tuple[dict[str, Any], Tensor]:
        """Return the arguments with images in others' places, and how many images [] are others than they were.

        Args:
            chosen: bool [n], the images that change places with each other; None: all.
        """
        usable = self.is_real if chosen is None else self.is_real & chosen
        partners = find_partners(self.kinds, usable, far=self.rows > 0 and self.number > self.rows)
        made: dict[str, Any] = {}
        if isinstance(self.value, PackedImages):
            made[self.name] = self.value.exchanged(partners, usable)
        else:
            made[self.name] = _taken(self.value, self.axes, partners)
        made.update({name: _taken(mask, self.axes, partners) for name, mask in self.follow.items()})
        return made, self._num_others(made[self.name])

    def _num_others(self, moved: Tensor) -> Tensor:
        if isinstance(self.value, PackedImages):
            before, after = self.value.numbers(), PackedImages(moved, self.value.grids).numbers()
            return ((before != after).any(dim=1) & self.value.is_sound.to(before.device)).sum()
        pair = [image_numbers(each.detach().reshape(self.number, 1, 1, -1)) for each in (self.value, moved)]
        if pair[0] is None or pair[1] is None:
            raise ValueError("an argument of images has none")
        return (pair[0] != pair[1]).any(dim=1).sum()


def find_partners(kinds: Tensor, usable: Tensor, *, far: bool) -> Tensor:
    """Return which image is put into the place of each; itself where it is not usable, or alone.

    Args:
        kinds: int64 [n, k].
        usable: bool [n].
        far: take the image half a batch away instead of the one before. Where there are more images than rows of the
            batch, those beside each other may be tiles of one.
    """
    pairs = usable.unsqueeze(1) & usable.unsqueeze(0)
    alike = pairs & (kinds.unsqueeze(1) == kinds.unsqueeze(0)).all(dim=2)
    every = torch.arange(usable.shape[0], device=usable.device)
    of_kind, of_any = _before(alike, far=far), _before(pairs, far=True)
    partners = torch.where(alike.sum(dim=1) > 1, of_kind, of_any)
    return torch.where(usable, partners, every)


def _before(group: Tensor, *, far: bool) -> Tensor:
    """Return the image some places before each one among those of its group [n, n], going round; int64 [n]."""
    rank = group.tril(diagonal=-1).sum(dim=1)
    size = group.sum(dim=1).clamp(min=1)
    wanted = (rank - (size // 2 if far else 1)) % size
    return (group & (rank.unsqueeze(0) == wanted.unsqueeze(1))).to(torch.uint8).argmax(dim=1)


def read_images(given: Mapping[str, Any]) -> Images | None:
    """Return a forward's images that come as one tensor; None where they do not, are fewer than two or too many."""
    found = find_images(given)
    if found is None or not isinstance(found[1], Tensor):
        return None
    name, value = found
    ids = ids_argument(given)
    rows = 0 if ids is None else int(given[ids].shape[0])
    packed = packed_images(given)
    if packed is not None:
        kinds = packed.grids.to(value.device, torch.int64, non_blocking=True)
        is_real = torch.ones(packed.num_images, dtype=torch.bool, device=value.device)
        made = Images(name=name, value=packed, axes=1, rows=rows, kinds=kinds, is_real=is_real)
    else:
        kind = _kind_of(given, value)
        axes = value.dim() - _IMAGE_AXES if kind is None else _KINDS[kind]
        if axes < 1:
            return None
        is_real = value.detach().flatten(0, axes - 1).flatten(1).ne(0).any(dim=1)
        kinds = torch.zeros(is_real.shape[0], 1, dtype=torch.int64, device=value.device)
        if kind is not None:
            kinds = given[kind].to(value.device, torch.int64, non_blocking=True).reshape(is_real.shape[0], -1)
        mask = given.get(_MASK)
        goes_along = isinstance(mask, Tensor) and mask.shape[:axes] == value.shape[:axes] and mask.dim() > axes
        follow = {_MASK: mask} if isinstance(mask, Tensor) and goes_along and kind is None else {}
        made = Images(name=name, value=value, axes=axes, rows=rows, kinds=kinds, is_real=is_real, follow=follow)
    return made if 1 < made.number <= MAX_IMAGES else None


def _kind_of(given: Mapping[str, Any], value: Tensor) -> str | None:
    """Return the argument that says of each image of a tensor what kind it is; None where there is none."""
    for name, axes in _KINDS.items():
        told = given.get(name)
        if not isinstance(told, Tensor) or told.dim() != 2 or told.is_floating_point():
            continue
        if value.dim() > axes and told.shape[:axes] == value.shape[:axes]:
            return name
    return None


def _taken(value: Tensor, axes: int, partners: Tensor) -> Tensor:
    flat = value.detach().flatten(0, axes - 1)
    return flat.index_select(0, partners.to(flat.device)).view(value.shape)
