"""Scikit-learn's scanned handwritten digits, split once into training and held-out images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

NUM_TRAINING_IMAGES = 1_500
IMAGE_SIZE_PIXELS = 8
PIXEL_MEAN = 0.305
PIXEL_STD = 0.376
_SPLIT_SEED = 20
_HIGHEST_PIXEL = 16.0
_SCREEN_SCALE = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitImages:
    """Images of one split, and what is true of each."""

    pixels: NDArray[np.float32]
    """[N, 8, 8], ink between 0 and 1."""
    names: NDArray[np.int64]
    """[N], the digit that each image shows."""
    ink_levels: NDArray[np.int64]
    """[N], 0 for the third of the training images with the least ink, 2 for the third with the most."""

    def __len__(self) -> int:
        """Count the images."""
        return len(self.names)

    def tile(self, index: int) -> torch.Tensor:
        """Return one image for the model, float32 [1 tile, 1 channel, 8, 8].

        Pixels are standardised: raw ones keep the model on a plateau where it ignores the image for hundreds of steps.
        """
        standardised = (self.pixels[index] - PIXEL_MEAN) / PIXEL_STD
        return torch.from_numpy(standardised.astype(np.float32))[None, None]

    def picture(self, indices: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return images side by side for a person, uint8 [H, W], enlarged since 8 pixels are too few to look at."""
        side_by_side = np.concatenate([self.pixels[index] for index in indices], axis=1)
        shades = np.round(side_by_side * 255).astype(np.uint8)
        return shades.repeat(_SCREEN_SCALE, axis=0).repeat(_SCREEN_SCALE, axis=1)


def load_splits() -> tuple[DigitImages, DigitImages]:
    """Return 1,500 training and 297 held-out images; the split is the same for every seed of a run."""
    images, names = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, IMAGE_SIZE_PIXELS, IMAGE_SIZE_PIXELS) / _HIGHEST_PIXEL).astype(np.float32)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(pixels))
    pixels, names = pixels[order], names[order].astype(np.int64)
    ink = pixels.mean(axis=(1, 2))
    ink_levels = np.digitize(ink, np.quantile(ink[:NUM_TRAINING_IMAGES], [1 / 3, 2 / 3])).astype(np.int64)
    training, held_out = slice(None, NUM_TRAINING_IMAGES), slice(NUM_TRAINING_IMAGES, None)
    return (
        DigitImages(pixels=pixels[training], names=names[training], ink_levels=ink_levels[training]),
        DigitImages(pixels=pixels[held_out], names=names[held_out], ink_levels=ink_levels[held_out]),
    )
