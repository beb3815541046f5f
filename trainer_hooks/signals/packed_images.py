"""Images whose patches come one after another, of all images of a batch in one tensor (Qwen-VL and its like).

How many patches belong to which image stands in a second argument, ``image_grid_thw``. It may lie on a device: all of
this is done in fixed shapes and without a host read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidestep.protocol.limits import MAX_SIGNAL_HASHES
from sidestep.trainer_hooks.signals.images import MAX_PIXELS_PER_IMAGE, PLACE_FACTORS, find_images

_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_GRID_WIDTH = 3
_PATCH_AXES = 3
"""Of patches that are padded to as many for each image [n, p, d]."""


@dataclass(frozen=True, slots=True)
class PackedImages:
    """Patches [p, ..] of several images, and the grid of each: frames, rows and columns of patches, int [n, 3]."""

    patches: Tensor
    grids: Tensor

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return self.grids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Patches of each image, int64 [n]."""
        return self.grids.to(torch.int64).prod(dim=1)

    @property
    def is_sound(self) -> Tensor:
        """Whether the grids are of these patches, bool []."""
        return self.lengths.sum() == self.patches.shape[0]

    def places(self) -> tuple[Tensor, Tensor]:
        """Return of each patch the number of its image and its place there, int64 [p]; of any where the grids lie."""
        ends = self.lengths.cumsum(dim=0)
        every = torch.arange(self.patches.shape[0], device=ends.device)
        image = torch.searchsorted(ends, every, right=True).clamp(max=self.num_images - 1)
        return image, every - (ends - self.lengths).index_select(0, image)

    def numbers(self) -> Tensor:
        """Return of each image what ``image_numbers`` does; float32 [n, 4]."""
        count = min(self.num_images, MAX_SIGNAL_HASHES)
        patches = self.patches.detach().flatten(1)
        every = min(-(-patches.numel() // (self.num_images * MAX_PIXELS_PER_IMAGE)), patches.shape[1])
        width = patches.shape[1] // every
        thinned = patches.narrow(1, 0, width * every).reshape(-1, width, every).select(2, 0)
        pixels = thinned.to(torch.float32)
        image, place = (each.to(pixels.device, non_blocking=True) for each in self.places())
        places = place.unsqueeze(1) * width + torch.arange(width, device=pixels.device)
        parts = [pixels.sum(dim=1), pixels.square().sum(dim=1), torch.full_like(pixels.select(1, 0), width)]
        for factor in PLACE_FACTORS:
            weights = (places * factor).frac_().sub_(0.5)
            parts += [(pixels * weights).sum(dim=1), weights.sum(dim=1)]
        # In float64, so that a device may add them in any order: what is made of them is rounded.
        sums = torch.zeros(self.num_images, len(parts), dtype=torch.float64, device=pixels.device)
        sums.index_add_(0, image, torch.stack(parts, dim=1).to(torch.float64))
        total, square, size, *weighted = sums.narrow(0, 0, count).unbind(dim=1)
        size = size.clamp(min=1)
        mean = total / size
        by_place = [(weighted[k] - mean * weighted[k + 1]) / size for k in range(0, len(weighted), 2)]
        return torch.stack((mean, square / size, *by_place), dim=1).to(torch.float32)

    def exchanged(self, partners: Tensor, is_other: Tensor) -> Tensor:
        """Return the patches with images in the place of others.

        Args:
            partners: which image is put into the place of each, int64 [n]; one of another grid gives patches of its
                and of what follows it.
            is_other: which images are replaced at all, bool [n].
        """
        image, place = (each.to(self.patches.device) for each in self.places())
        lengths = self.lengths.to(self.patches.device)
        begins = lengths.cumsum(dim=0) - lengths
        taken = begins.index_select(0, partners.index_select(0, image)) + place
        every = torch.arange(self.patches.shape[0], device=self.patches.device)
        taken = torch.where(is_other.index_select(0, image), taken % max(1, every.shape[0]), every)
        return self.patches.detach().index_select(0, taken)


def packed_images(given: Mapping[str, Any]) -> PackedImages | None:
    """Return the images of a forward that come as patches one after another; None where they come otherwise."""
    found = find_images(given)
    return None if found is None else _packed(given, *found)


def _packed(given: Mapping[str, Any], name: str, value: Any) -> PackedImages | None:
    grids = given.get(_GRIDS.get(name, ""))
    if not isinstance(value, Tensor) or not isinstance(grids, Tensor) or value.dim() < 2:
        return None
    is_grid = grids.dim() == 2 and grids.shape[1] == _GRID_WIDTH and not grids.is_floating_point()
    is_one_each = value.shape[0] == grids.shape[0]  # images as they are, whose grids are told besides
    return PackedImages(value, grids) if is_grid and grids.shape[0] and not is_one_each else None


def images_of(given: Mapping[str, Any]) -> Any:
    """Return the images of a forward for those that look at each: packed ones as such; None where there are none."""
    found = find_images(given)
    if found is None:
        return None
    packed = _packed(given, *found)
    if packed is not None:
        return packed
    value, shapes = found[1], given.get("spatial_shapes")
    if isinstance(value, Tensor) and isinstance(shapes, Tensor) and value.dim() == _PATCH_AXES:
        return value.unsqueeze(1) if value.shape[0] == shapes.shape[0] else value
    return value
