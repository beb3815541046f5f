"""All tensors of a step as one table of chunks: what a kernel's programs read to know their memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.trainer_hooks.reductions.host_index import to_device

ALIGNMENT_BYTES = 16
"""What a device reads at once; addresses that are no multiples of it are reduced apart."""


class Stretch(NamedTuple):
    """A flat tensor that is to be reduced."""

    slot: int
    """Its row in the result."""
    module: int
    """Its row among the histograms."""
    values: Tensor
    """[n], n > 0, contiguous."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Chunks of one dtype, that one launch reduces."""

    dtype: torch.dtype
    is_aligned: bool
    first_chunk: int
    num_chunks: int


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """Where everything lies; holds addresses, and no tensor alive."""

    key: tuple[object, ...]
    """What it was made from: it holds as long as this is the same."""
    chunks: Tensor
    """Address, elements, module; int64 [chunks, 3]."""
    spans: Tensor
    """First chunk, number of chunks, slot; int64 [tensors, 3]."""
    launches: tuple[Launch, ...]
    num_chunks: int
    most_chunks: int
    """Of one tensor."""


def table_key(stretches: Sequence[Stretch], device: torch.device, chunk_elements: int) -> tuple[object, ...]:
    """Return all that a table depends on."""
    return (
        device,
        chunk_elements,
        *((slot, module, t.data_ptr(), t.shape[0], t.dtype) for slot, module, t in stretches),
    )


def make_table(
    key: tuple[object, ...], stretches: Sequence[Stretch], device: torch.device, chunk_elements: int
) -> ChunkTable:
    """Cut every tensor into chunks of ``chunk_elements``, and send the table to the device without waiting for it."""
    ordered = sorted(stretches, key=_launch_of)
    sizes = np.array([each.values.shape[0] for each in ordered], np.int64)
    counts = -(-sizes // chunk_elements)
    first = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(sizes.size), counts)
    place = (np.arange(owner.size) - first[owner]) * chunk_elements
    addresses = np.array([each.values.data_ptr() for each in ordered], np.int64)
    widths = np.array([each.values.element_size() for each in ordered], np.int64)
    modules = np.array([each.module for each in ordered], np.int64)
    slots = np.array([each.slot for each in ordered], np.int64)
    rows = (addresses[owner] + place * widths[owner], np.minimum(sizes[owner] - place, chunk_elements), modules[owner])
    return ChunkTable(
        key,
        to_device(np.stack(rows, axis=1), device),
        to_device(np.stack((first, counts, slots), axis=1), device),
        _launches(ordered, counts),
        int(owner.size),
        int(counts.max(initial=0)),
    )


def _launch_of(stretch: Stretch) -> tuple[str, bool]:
    return str(stretch.values.dtype), stretch.values.data_ptr() % ALIGNMENT_BYTES != 0


def _launches(ordered: Sequence[Stretch], counts: NDArray[np.int64]) -> tuple[Launch, ...]:
    launches: list[Launch] = []
    begun: tuple[str, bool] | None = None
    first = 0
    for stretch, count in zip(ordered, counts.tolist(), strict=True):
        if _launch_of(stretch) != begun:
            begun = _launch_of(stretch)
            launches.append(Launch(stretch.values.dtype, not begun[1], first, 0))
        last = launches[-1]
        launches[-1] = Launch(last.dtype, last.is_aligned, last.first_chunk, last.num_chunks + count)
        first += count
    return tuple(launches)
