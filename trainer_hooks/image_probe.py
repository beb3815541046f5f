"""What the images are worth to the model: the loss of a micro-batch as it is, and with each image in another's place.

The only signal that tells a model which never learnt to look from one that did (docs/detection.md). It costs two
forwards of one micro-batch on its own interval, on rank 0: in evaluation mode, eager, the random state kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidestep.protocol.limits import MAX_SIGNAL_HASHES
from sidestep.protocol.messages import Message, Probe
from sidestep.trainer_hooks.capture import Batch, ForwardReader
from sidestep.trainer_hooks.image_exchange import read_images
from sidestep.trainer_hooks.isolation import undisturbed
from sidestep.trainer_hooks.kept_batch import AskedLogits, KeptBatch, Ran
from sidestep.trainer_hooks.parameters import unwrapped
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.host_index import to_device
from sidestep.trainer_hooks.signals.images import find_images, image_leaves, image_numbers, num_images
from sidestep.trainer_hooks.signals.packed_images import PackedImages, images_of
from sidestep.trainer_hooks.signals.rows import choose_on_device, choose_on_host, row_signals

MAX_ROWS = 512
"""Labelled positions that the two losses are means over."""
_IMAGE_AXES = 3
_MASK_ARGUMENTS = ("pixel_attention_mask", "image_sizes", "image_grid_thw")
"""Arguments that belong to single images: where they stand, images of different sizes may be meant."""


class ImageProbe:
    """Keeps one micro-batch of a due step until the step has ended, and looks at it twice."""

    name = "image_probe"

    def __init__(self, model: nn.Module, reader: ForwardReader, interval: int) -> None:
        """Probe every ``interval`` steps; 0: never."""
        self._model = unwrapped(model)
        self._logits = AskedLogits(self._model, reader)
        self._interval = interval
        self._kept = KeptBatch()

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is probed; step 0 is not, as nothing has been learnt."""
        return self._interval > 0 and step > 0 and step % self._interval == 0

    def see(self, given: Mapping[str, Any]) -> None:
        """Keep the arguments of a due step's first forward that has at least two images."""
        if has_several(given):
            self._kept.see(given)

    def keep(self, batch: Batch, align: Callable[[Batch], AlignedBatch]) -> None:
        """Take the labels that belong to what was seen."""
        self._kept.keep(batch, align)

    def run(self, step: int) -> Ran | None:
        """Look at what was kept, and let go of it; None where nothing was.

        Returns:
            Device tensors, and what makes the message of them once they are on the host.

        Raises:
            Exception: whatever the model's forward raises.
        """
        taken = self._kept.take()
        moved = rolled(taken[0]) if taken is not None else None
        if taken is None or moved is None:
            return None
        given, aligned = taken
        began = time.perf_counter()
        with undisturbed(self._model):
            plain, counted = self._loss(given, aligned)
            other, _ = self._loss({**given, **moved[0]}, aligned)
        tensors = {"losses": torch.stack((plain, other)), "counted": counted, "moved": moved[1]}
        seconds = time.perf_counter() - began

        def finish(arrays: Mapping[str, Any]) -> Sequence[Message]:
            losses = arrays["losses"]
            return (
                Probe(
                    step=step,
                    loss=float(losses[0]),
                    rolled_loss=float(losses[1]),
                    labelled=int(arrays["counted"]),
                    images=int(arrays["moved"]),
                    seconds=seconds,
                ),
            )

        return tensors, finish

    def _loss(self, given: Mapping[str, Any], aligned: AlignedBatch) -> tuple[Tensor, Tensor]:
        """Mean loss over chosen labelled positions, and how many they are."""
        source = self._logits(given, aligned)
        if source is None:
            raise ValueError("the forward shows no logits [b, t, v]: what images are worth cannot be told")
        positions = aligned.targets.shape[1]
        if aligned.on_host:
            index = to_device(choose_on_host(aligned.runs_on_host, MAX_ROWS, 0).index, source.device)
        else:
            index = choose_on_device(aligned, MAX_ROWS, 0)[0]
        here = index.to(aligned.targets.device)
        counted = aligned.labelled.flatten().index_select(0, here).to(source.device)
        targets = aligned.targets.flatten().index_select(0, here).to(source.device, torch.int64)
        read = row_signals(source, index // positions, index % positions, targets, eos_id=None, weights=None)
        losses = torch.where(counted, read.numbers[0], 0.0).sum(dtype=torch.float64)
        number = counted.sum()
        return losses / number, number


def has_several(given: Mapping[str, Any]) -> bool:
    """Return whether a forward has at least two images, as far as the shapes tell."""
    images = images_of(given)
    return (images.num_images if isinstance(images, PackedImages) else num_images(images)) > 1


def rolled(given: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor] | None:
    """Return a forward's image arguments with each image in the place of another, and how many are others then.

    Of a list, in the place of the one before; None with fewer than two images, and where the shapes in a list differ:
    another size may mean another number of tokens.
    """
    found = find_images(given)
    if found is None:
        return None
    name, value = found
    if isinstance(value, Tensor):
        images = read_images(given)
        return None if images is None else images.exchanged()
    leaves = list(image_leaves(value))
    if len(leaves) < 2 or num_images(value) < 2 or len({leaf.shape for leaf in leaves}) > 1:
        return None  # none, or the tiles of a single image
    moved = {name: _replaced(value, iter([leaf.detach() for leaf in (*leaves[-1:], *leaves[:-1])]))}
    return moved, _num_others(value, moved[name])


def _num_others(value: Any, moved: Any) -> Tensor:
    """Return how many images [] are others than they were."""
    before, after = image_numbers(value), image_numbers(moved)
    if before is None or after is None:
        raise ValueError("an argument of images has none")
    return (before != after).any(dim=1).sum()


def rolled_tiles(given: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor] | None:
    """Return lists of images [.., C, H, W] with each tile in the place of the one before, over images; as ``rolled``.

    Images keep their numbers of tiles, so that they stand for as many tokens: what is shown differs, and belongs to
    nothing. None where the tiles are of several sizes.
    """
    found = find_images(given)
    if found is None or num_images(found[1]) < 2:
        return None
    name, value = found
    leaves = list(image_leaves(value))
    kinds = {(leaf.shape[-_IMAGE_AXES:], leaf.dtype, leaf.device) for leaf in leaves}
    if isinstance(value, Tensor) or len(kinds) > 1 or leaves[0].dim() <= _IMAGE_AXES:
        return None
    tiles = torch.cat([leaf.detach().flatten(0, leaf.dim() - _IMAGE_AXES - 1) for leaf in leaves]).roll(1, dims=0)
    sizes = [leaf.shape[: leaf.dim() - _IMAGE_AXES].numel() for leaf in leaves]
    moved = [part.view(leaf.shape) for part, leaf in zip(torch.split(tiles, sizes), leaves, strict=True)]
    made = _replaced(value, iter(moved))
    return {name: made}, _num_others(value, made)


def rolled_rows(
    given: Mapping[str, Any], num_rows: int
) -> tuple[dict[str, Any], Tensor, Sequence[int] | Tensor] | None:
    """As ``rolled``, over the images of every second row alone; and how many tiles, or patches, each row has [rows].

    None where images do not come by rows of the batch, as far as their number tells, or the chosen rows have too few.
    """
    found = find_images(given)
    if found is not None and isinstance(found[1], Tensor):
        images = read_images(given)
        by_rows = 0 if images is None or images.rows != num_rows else images.by_rows
        if images is None or not by_rows or num_rows <= 2:
            return None
        every = torch.arange(images.number, device=images.is_real.device)
        return (*images.exchanged(every // by_rows % 2 == 0), images.tokens_by_rows())
    if found is None or len(found[1]) != num_rows or any(name in given for name in _MASK_ARGUMENTS):
        return None
    name, value = found
    parts = list(value)
    moved = rolled({name: parts[::2]}) or rolled_tiles({name: parts[::2]})
    if moved is None:
        return None
    tiles = [num_images(part) for part in parts]
    parts[::2] = moved[0][name]
    return {name: type(value)(parts)}, moved[1], tiles


@dataclass(frozen=True, slots=True)
class LastReplaced:
    """A forward's images with the last one of each row alone replaced by that of the row above."""

    given: dict[str, Any]
    differs: Tensor
    """In which rows it is another image than it was, bool [rows]."""
    tiles: list[int]
    """Tiles of each row [rows]."""
    last_tiles: list[int]
    """Of these, tiles of its last image [rows]."""


def last_replaced(given: Mapping[str, Any], num_rows: int) -> LastReplaced | None:
    """Replace the last image of each row that has one.

    None where images do not come in lists by rows of the batch, where no row has several, and where the last ones are
    of several shapes: another size may mean another number of tokens.
    """
    found = find_images(given)
    if found is None or not isinstance(found[1], list | tuple) or any(name in given for name in _MASK_ARGUMENTS):
        return None
    name, value = found
    if len(value) != num_rows or not all(isinstance(part, list | tuple) for part in value):
        return None
    places = [place for place, part in enumerate(value) if part and isinstance(part[-1], Tensor)]
    last = [value[place][-1].detach() for place in places]
    tiles, last_tiles = [num_images(part) for part in value], [0] * num_rows
    for place, image in zip(places, last, strict=True):
        last_tiles[place] = num_images(image)
    is_alike = len(last) > 1 and len({image.shape for image in last}) == 1 and last[0].numel() > 0
    if not is_alike or tiles == last_tiles or sum(last_tiles) > MAX_SIGNAL_HASHES:
        return None
    above = [*last[-1:], *last[:-1]]
    before, after = image_numbers(last), image_numbers(above)
    if before is None or after is None:
        return None
    rows = list(value)
    for place, image in zip(places, above, strict=True):
        rows[place] = type(rows[place])([*rows[place][:-1], image])
    is_other = (before != after).any(dim=1).view(len(last), -1).any(dim=1)
    index = to_device(np.array(places, np.int64), is_other.device)
    differs = torch.zeros(num_rows, dtype=torch.bool, device=is_other.device).index_copy(0, index, is_other)
    return LastReplaced({name: type(value)(rows)}, differs, tiles, last_tiles)


def _replaced(value: Any, leaves: Any) -> Any:
    if isinstance(value, Tensor):
        return next(leaves) if value.numel() else value
    if isinstance(value, list | tuple):
        return type(value)([_replaced(each, leaves) for each in value])
    return value
