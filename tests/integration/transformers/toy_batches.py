"""Batches for toy models, as processors make them: questions about pictures, answered with what is on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PAD, BOS, EOS, IMAGE, OPEN, CLOSE, VIDEO = range(7)
FIRST_WORD, VOCABULARY = 10, 240
NUM_KINDS, NUM_QUESTIONS = 4, 3
IGNORED = -100
BATCH, SIDE, PATCH = 8, 16, 4

Inputs = dict[str, Any]
MakeBatch = Callable[[torch.Generator], Inputs]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A model of some ten thousand random parameters, and what it is trained on."""

    name: str
    model: Callable[[], Any]
    batch: MakeBatch
    num_images: int = BATCH
    """Images of a batch; 0 for text alone."""
    is_decoder: bool = True
    """Else an encoder-decoder, whose wiring is not probed."""
    reads_padding: bool = False
    """Its recurrent layers do not look at the mask."""
    has_other_loss: bool = False
    """Its loss is more than the cross-entropy of its answers."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A question about images."""

    images: list[torch.Tensor]
    question: list[int]
    answer: list[int]


def make_rows(generator: torch.Generator, images_of: list[int]) -> list[Row]:
    """Return as many rows as there are numbers of images; the answer names the kind of the last one."""
    return [_row(generator, number) for number in images_of]


def _row(generator: torch.Generator, num_images: int) -> Row:
    kinds = torch.randint(0, NUM_KINDS, (max(1, num_images),), generator=generator).tolist()
    asked, length = (int(torch.randint(*span, (), generator=generator)) for span in ((0, NUM_QUESTIONS), (1, 6)))
    filler = (FIRST_WORD + 20 + torch.randint(0, 10, (length,), generator=generator)).tolist()
    said = [FIRST_WORD + 10 + place for place in range(asked)]
    told = [] if num_images else [FIRST_WORD + 60 + kinds[-1]]  # without an image the question tells its kind
    return Row(
        images=[picture(kind, generator) for kind in kinds[:num_images]],
        question=[*told, *filler, FIRST_WORD + 40 + asked],
        answer=[*said, FIRST_WORD + kinds[-1], EOS],
    )


def picture(kind: int, generator: torch.Generator) -> torch.Tensor:
    """Return [3, SIDE, SIDE]: one bright colour, or a dark half."""
    made = torch.rand(3, SIDE, SIDE, generator=generator) * 0.4 - 0.2
    if kind < NUM_KINDS - 1:
        made[kind] += 1.5
    else:
        made[:, : SIDE // 2] -= 1.5
    return made


def patches_of(image: torch.Tensor) -> torch.Tensor:
    """Cut an image [3, H, W] into patches [H / PATCH, W / PATCH, 3, PATCH, PATCH]."""
    return image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)


def collate(rows: list[Row], placeholders: Callable[[Row], list[int]], *, left: bool = True) -> Inputs:
    """Return ids, labels of the answers that are not shifted, and mask, padded on one side."""
    whole = [[BOS, *placeholders(row), *row.question, *row.answer] for row in rows]
    longest = max(map(len, whole))
    made: Inputs = {"input_ids": [], "labels": [], "attention_mask": []}
    for row, ids in zip(rows, whole, strict=True):
        front = longest - len(ids) if left else 0
        back = longest - len(ids) - front
        labels = [IGNORED] * (len(ids) - len(row.answer)) + row.answer
        made["input_ids"].append([PAD] * front + ids + [PAD] * back)
        made["labels"].append([IGNORED] * front + labels + [IGNORED] * back)
        made["attention_mask"].append([0] * front + [1] * len(ids) + [0] * back)
    return {name: torch.tensor(values) for name, values in made.items()}


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Return rows [b, t] of one length, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def with_pixels(
    num_tokens: int,
    *,
    left: bool = True,
    images_of: list[int] | None = None,
    by_rows: bool = False,
    tiles: int = 1,
    framed: bool = False,
    more: Callable[[Inputs], Inputs] | None = None,
) -> MakeBatch:
    """Return what makes batches whose images come as pixels.

    Args:
        num_tokens: placeholders of an image.
        left: padding stands on the left.
        images_of: images of each row; None: one each.
        by_rows: they come as [b, most of a row, 3, H, W], filled up with zeros; else as [n, 3, H, W].
        tiles: of each image.
        framed: placeholders stand between two other tokens.
        more: arguments that are made of these.
    """
    wanted = [1] * BATCH if images_of is None else images_of

    def made(generator: torch.Generator) -> Inputs:
        rows = make_rows(generator, wanted)
        one = [OPEN, *[IMAGE] * num_tokens, CLOSE] if framed else [IMAGE] * num_tokens
        inputs = collate(rows, lambda row: one * len(row.images), left=left)
        if by_rows:
            pixels = torch.zeros(len(rows), max(wanted), 3, SIDE, SIDE)
            for number, row in enumerate(rows):
                pixels[number, : len(row.images)] = torch.stack(row.images)
        else:
            pixels = torch.stack([image for row in rows for image in row.images for _ in range(tiles)])
        inputs["pixel_values"] = pixels
        return inputs if more is None else {**inputs, **more(inputs)}

    return made
