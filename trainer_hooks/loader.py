"""Hashes of samples and images made where the batches are: in the data loader's own worker processes.

What comes of a batch there are a few numbers for each row and image, which travel with it and reach the hooks when the
training loop takes the batch. They are the numbers that the hooks would otherwise work out of the forward's tensors,
so nothing else about a run is different (docs/detection.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.trainer_hooks.signals.counts import hash_on_host
from sidestep.trainer_hooks.signals.images import image_numbers
from sidestep.trainer_hooks.signals.packed_images import PackedImages, images_of

_ROWS_AND_POSITIONS = 2


class BatchHashes(NamedTuple):
    """What tells a batch's rows and images apart."""

    samples: NDArray[np.int64]
    """One per row [b]."""
    images: NDArray[np.float32] | None
    """Four numbers of each image [n, 4] (``image_numbers``); None without images."""


class HashedBatch(NamedTuple):
    """A batch on its way to the loop.

    A tuple, so that whoever pins it, or moves it to a device, finds the tensors in it.
    """

    batch: Any
    hashes: BatchHashes | None
    problem: str = ""
    """Why there are none, though there should be."""


def hashes_of(batch: Any) -> BatchHashes | None:
    """Return what a batch's rows and images hash to; None where it holds no ``labels`` [b, t] by that name."""
    if not isinstance(batch, Mapping):
        return None
    labels, ids = (_rows(batch.get(name)) for name in ("labels", "input_ids"))
    if labels is None:
        return None
    found = images_of(batch)
    with torch.no_grad():
        numbers = found.numbers() if isinstance(found, PackedImages) else None
        images = image_numbers(found) if numbers is None and found is not None else numbers
    return BatchHashes(
        hash_on_host(labels, ids),
        None if images is None else images.numpy(),
    )


def _rows(values: Any) -> NDArray[Any] | None:
    is_rows = isinstance(values, Tensor) and values.is_cpu and values.dim() == _ROWS_AND_POSITIONS
    return values.numpy() if is_rows and not values.is_floating_point() else None


class HashingCollate:
    """A loader's ``collate_fn``, and hashes of what it returns; pickled into worker processes."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        """Return the batch with its hashes, or alone where they cannot be made."""
        batch = self.collate(samples)
        try:
            hashes = hashes_of(batch)
        except Exception as error:  # noqa: BLE001  (counted and said in the trainer's process, where the hooks are)
            return HashedBatch(batch, None, f"{type(error).__name__}: {error}")
        return batch if hashes is None else HashedBatch(batch, hashes)


class WatchedLoader:
    """A loader as it was, whose batches are hashed by its workers; iterate over this one in its place."""

    def __init__(self, loader: Any, hand: Callable[[HashedBatch], object]) -> None:
        """Put ``HashingCollate`` around the loader's ``collate_fn``.

        Args:
            loader: a ``torch.utils.data.DataLoader``, or what iterates over one and has its ``collate_fn``.
            hand: gets each batch with its hashes when the loop takes it.

        Raises:
            TypeError: it has no ``collate_fn``.
        """
        collate = getattr(loader, "collate_fn", None)
        if not callable(collate):
            raise TypeError(
                f"watch_loader() takes a DataLoader, whose collate_fn it wraps, not {type(loader).__name__}"
            )
        if not isinstance(collate, HashingCollate):
            loader.collate_fn = HashingCollate(collate)
        self._loader = loader
        self._hand = hand

    def __iter__(self) -> Iterator[Any]:
        """Yield the loader's batches."""
        for each in self._loader:
            if isinstance(each, HashedBatch):
                self._hand(each)
                yield each.batch
            else:
                yield each

    def __len__(self) -> int:
        """Return the loader's length."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        """Return what the loader has under this name (``sampler``, ``dataset``, ``set_epoch``, ...)."""
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)
