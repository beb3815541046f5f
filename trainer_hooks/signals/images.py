"""The images of a forward: where they are among its arguments, and three numbers of each that tell images apart."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.limits import MAX_SIGNAL_HASHES

IMAGE_ARGUMENTS = ("pixel_values", "images", "image", "pixel_values_images", "pixel_values_videos")
MAX_PIXELS_PER_IMAGE = 1 << 16
"""Of a larger image every so-manieth pixel is read: enough to tell pages of text apart."""
_IMAGE_AXES = 3
_NUMBERS = 4
_NESTS = (list, tuple)
PLACE_FACTORS = (0.7548776662466927, 0.5698402909980532)
"""Of the two equidistributed sequences that weigh pixels by their places."""


def find_images(given: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the first argument that holds images, by name, and what it holds; None where there is none."""
    for name in IMAGE_ARGUMENTS:
        value = given.get(name)
        if value is not None and _has_leaf(value):
            return name, value
    return None


def _has_leaf(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 0
    return isinstance(value, _NESTS) and any(map(_has_leaf, value))


def image_leaves(value: Any) -> list[Tensor]:
    """Return the tensors of an argument, of whatever nesting, that have an element."""
    found: list[Tensor] = []
    _collect((value,), found)
    return found


def _collect(values: Sequence[Any], found: list[Tensor]) -> None:
    for each in values:
        if isinstance(each, Tensor):
            if each.numel():
                found.append(each)
        elif isinstance(each, _NESTS):
            _collect(each, found)


def num_images(value: Any) -> int:
    """Return how many images an argument holds, as far as the shapes tell.

    [C, H, W] is one image, [.., C, H, W] are many, [n, d] are patches that cannot be told apart without reading the
    device: they count as one image.
    """
    return sum(leaf.shape[: max(0, leaf.dim() - _IMAGE_AXES)].numel() for leaf in image_leaves(value))


def image_rows(value: Any) -> list[Tensor]:
    """Return the images as tensors [n, pixels] in their order; those of one size that follow each other together."""
    if isinstance(value, Tensor) and value.dim() > _IMAGE_AXES:  # the common case, without the ways of the others
        return [value.detach().flatten(0, value.dim() - _IMAGE_AXES - 1).flatten(1)] if value.numel() else []
    groups = groupby(image_leaves(value), key=lambda leaf: (leaf.shape, leaf.dtype, leaf.device))
    rows = []
    for _, group in groups:
        leaves = list(group)
        axes = min(_IMAGE_AXES, leaves[0].dim())
        together = torch.stack(leaves) if len(leaves) > 1 else leaves[0].unsqueeze(0)
        rows.append(together.detach().flatten(0, together.dim() - axes - 1).flatten(1))
    return rows


def copied_images(value: Any, most_bytes: int) -> Tensor | None:
    """Return a copy [n, pixels] of images that are on the host and all of one size; at most ``MAX_SIGNAL_HASHES``.

    None where there are none, where they are on a device or differ, and where they take more than ``most_bytes``.
    """
    leaves = image_leaves(value)
    if not leaves:
        return None
    first = leaves[0]
    shape, dtype = first.shape, first.dtype
    if not shape or len(leaves) * first.nbytes > most_bytes:
        return None
    if not all(leaf.shape == shape and leaf.dtype is dtype and leaf.is_cpu for leaf in leaves):
        return None
    axes = min(_IMAGE_AXES, len(shape))
    each = shape[: len(shape) - axes].numel()
    taken = leaves[: -(-MAX_SIGNAL_HASHES // each)]
    return torch.cat(taken).detach().reshape(len(taken) * each, -1)[:MAX_SIGNAL_HASHES]


def image_numbers(value: Any) -> Tensor | None:
    """Return mean, mean square and two weighted sums of the pixels of each image; float32 [n, 4], None without images.

    One read of at most ``MAX_PIXELS_PER_IMAGE`` pixels of at most ``MAX_SIGNAL_HASHES`` images; on their device.
    """
    found: list[Tensor] = []
    left = MAX_SIGNAL_HASHES
    for rows in image_rows(value):
        if left <= 0:
            break
        found.append(_numbers(_thinned(rows.narrow(0, 0, min(left, rows.shape[0])))))
        left -= rows.shape[0]
    return torch.cat([each.to(found[0].device, non_blocking=True) for each in found]) if found else None


def _thinned(flat: Tensor) -> Tensor:
    every = -(-flat.shape[1] // MAX_PIXELS_PER_IMAGE)
    if every == 1:
        return flat
    width = flat.shape[1] // every
    return flat.narrow(1, 0, width * every).reshape(-1, width, every).select(2, 0)


def _numbers(flat: Tensor) -> Tensor:
    pixels = flat.to(torch.float32)
    mean = pixels.mean(dim=1, keepdim=True)
    square = pixels.square().mean(dim=1)
    places = torch.arange(pixels.shape[1], dtype=torch.float32, device=pixels.device)
    # Two equidistributed sequences: no two places weigh the same in both. The mean is taken out, so that pages of
    # paper differ by what is written on them.
    centred = pixels - mean
    sums = [(centred * (places * factor).frac_().sub_(0.5)).mean(dim=1) for factor in PLACE_FACTORS]
    return torch.stack((mean.squeeze(1), square, *sums), dim=1)


def describe_images(
    numbers: Sequence[NDArray[np.float32]],
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Return hash int64 [n], deviation and mean of pixels float32 [n] of each image, from what ``image_numbers`` gave.

    Numbers are rounded to 11 bits before they are hashed: in another batch an image may come out a last bit apart.
    """
    rows = np.concatenate(numbers)[:MAX_SIGNAL_HASHES] if numbers else np.zeros((0, _NUMBERS), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        variance = rows[:, 1].astype(np.float64) - rows[:, 0].astype(np.float64) ** 2
        is_flat = variance < rows[:, 1] * 1e-6  # below the rounding of float32 there is nothing but that rounding
        deviations = np.sqrt(np.where(is_flat, 0.0, variance))
        rounded = np.where(is_flat[:, None] & (np.arange(_NUMBERS) > 1), 0.0, rows).astype(np.float16)
    hashes = np.array([zlib.crc32(row.tobytes()) for row in rounded], np.int64)
    return hashes, deviations.astype(np.float32), rows[:, 0].astype(np.float32)
