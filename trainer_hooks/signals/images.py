"""The images of a forward: where they are among its arguments, and three numbers of each that tell images apart."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
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
_FACTORS = (0.7548776662466927, 0.5698402909980532)


def find_images(given: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the first argument that holds images, by name, and what it holds; None where there is none."""
    for name in IMAGE_ARGUMENTS:
        value = given.get(name)
        if isinstance(value, Tensor | list | tuple) and image_tensors(value):
            return name, value
    return None


def image_tensors(value: Any) -> list[Tensor]:
    """Return tensors [n, ...] whose first axis counts images, of whatever nesting the trainer's argument has.

    [C, H, W] is one image, [.., C, H, W] are many, [n, d] are patches that cannot be told apart without reading the
    device: they count as one image.
    """
    if isinstance(value, Tensor):
        if not value.numel():
            return []
        if value.dim() <= _IMAGE_AXES:
            return [value.detach().reshape(1, -1)]
        return [value.detach().flatten(0, value.dim() - _IMAGE_AXES - 1).flatten(1)]
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in image_tensors(each)]
    return []


def image_numbers(value: Any) -> Tensor | None:
    """Return mean, mean square and two weighted sums of the pixels of each image; float32 [n, 4], None without images.

    One read of at most ``MAX_PIXELS_PER_IMAGE`` pixels of at most ``MAX_SIGNAL_HASHES`` images; on their device.
    """
    found: list[Tensor] = []
    left = MAX_SIGNAL_HASHES
    for flat in image_tensors(value):
        if left <= 0:
            break
        found.append(_numbers(flat.narrow(0, 0, min(left, flat.shape[0]))))
        left -= flat.shape[0]
    return torch.cat([each.to(found[0].device, non_blocking=True) for each in found]) if found else None


def _numbers(flat: Tensor) -> Tensor:
    every = -(-flat.shape[1] // MAX_PIXELS_PER_IMAGE)
    width = flat.shape[1] // every
    pixels = flat.narrow(1, 0, width * every).reshape(-1, width, every).select(2, 0).to(torch.float32)
    mean = pixels.mean(dim=1, keepdim=True)
    square = pixels.square().mean(dim=1)
    places = torch.arange(pixels.shape[1], dtype=torch.float32, device=pixels.device)
    # Two equidistributed sequences: no two places weigh the same in both. The mean is taken out, so that pages of
    # paper differ by what is written on them.
    centred = pixels - mean
    sums = [(centred * (places * factor).frac_().sub_(0.5)).mean(dim=1) for factor in _FACTORS]
    return torch.stack((mean.squeeze(1), square, *sums), dim=1)


def describe_images(numbers: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return hash int64 [n] and standard deviation float32 [n] of each image, from what ``image_numbers`` returned.

    Numbers are rounded to 11 bits before they are hashed: in another batch an image may come out a last bit apart.
    """
    rows = np.concatenate(numbers)[:MAX_SIGNAL_HASHES] if numbers else np.zeros((0, _NUMBERS), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        variance = rows[:, 1].astype(np.float64) - rows[:, 0].astype(np.float64) ** 2
        is_flat = variance < rows[:, 1] * 1e-6  # below the rounding of float32 there is nothing but that rounding
        deviations = np.sqrt(np.where(is_flat, 0.0, variance))
        rounded = np.where(is_flat[:, None] & (np.arange(_NUMBERS) > 1), 0.0, rows).astype(np.float16)
    hashes = np.array([zlib.crc32(row.tobytes()) for row in rounded], np.int64)
    return hashes, deviations.astype(np.float32)
