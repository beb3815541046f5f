"""Conversations packed into rows of one length, as nanoVLM packs them, and rows collated into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import IterableDataset

from sidestep.examples.digits_vqa.digits import DigitImages
from sidestep.examples.digits_vqa.failures import NEVER, every_answer_becomes_a
from sidestep.examples.digits_vqa.questions import Conversation, converse
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """One conversation, ready to be packed."""

    input_ids: list[int]
    """Token ids."""
    labels: list[int]
    """`labels[t]` is the target of `logits[t]`, that is `input_ids[t + 1]`, or -100."""
    images: list[torch.Tensor]
    """One float32 tensor [1, 1, 8, 8] per image placeholder."""


class Row(TypedDict):
    """One packed row, T positions."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    images: list[torch.Tensor]
    epoch: int


class Batch(TypedDict):
    """B packed rows: int64 [B, T] on the CPU, images as a list (rows) of lists of float32 [1, 1, 8, 8]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    images: list[list[torch.Tensor]]
    epoch: int


def encode_sample(conversation: Conversation, images: DigitImages, tokenizer: ChatTokenizer) -> EncodedSample:
    """Return the ids of a conversation and its labels, already shifted by one position."""
    tiles = [images.tile(index) for index in conversation.image_indices]
    turns = tokenizer.encode_turns(conversation.turns, num_images=len(tiles))
    targets = [token if answer else IGNORE_INDEX for token, answer in zip(turns.ids, turns.is_answer, strict=True)]
    return EncodedSample(input_ids=turns.ids, labels=[*targets[1:], IGNORE_INDEX], images=tiles)


def pack(samples: Sequence[EncodedSample], *, length: int, pad_token_id: int, epoch: int) -> Row:
    """Return one row: each sample followed by one separator (the padding id, masked), left-padded to `length`.

    Raises:
        ValueError: the samples and their separators are longer than the row.
    """
    ids: list[int] = []
    labels: list[int] = []
    mask: list[int] = []
    for sample in samples:
        ids += [*sample.input_ids, pad_token_id]
        labels += [*sample.labels, IGNORE_INDEX]
        mask += [*[1] * len(sample.input_ids), 0]
    num_padding = length - len(ids)
    if num_padding < 0:
        raise ValueError(f"{len(ids)} tokens do not fit a row of {length}")
    return Row(
        input_ids=torch.tensor([pad_token_id] * num_padding + ids),
        labels=torch.tensor([IGNORE_INDEX] * num_padding + labels),
        attention_mask=torch.tensor([0] * num_padding + mask),
        images=[tile for sample in samples for tile in sample.images],
        epoch=epoch,
    )


class PackedRows(IterableDataset[Row]):
    """An endless stream of packed rows; the same seed gives the same rows."""

    def __init__(
        self,
        images: DigitImages,
        tokenizer: ChatTokenizer,
        *,
        length: int,
        seed: int,
        first_row_with_a: int | None = NEVER,
    ) -> None:
        """Stream rows of `length` tokens; from row `first_row_with_a` on every answer is the letter A."""
        self._images = images
        self._tokenizer = tokenizer
        self._length = length
        self._seed = seed
        self._first_row_with_a = first_row_with_a

    def __iter__(self) -> Iterator[Row]:
        """Yield rows from the first epoch on; a row that two epochs share belongs to the one that it begins in."""
        conversations = self._conversations()
        epoch, waiting = next(conversations)
        for row_index in count():
            row_epoch = epoch
            spoilt = self._first_row_with_a is not None and row_index >= self._first_row_with_a
            samples: list[EncodedSample] = []
            free_tokens = self._length
            while True:
                said = every_answer_becomes_a(waiting) if spoilt else waiting
                sample = encode_sample(said, self._images, self._tokenizer)
                free_tokens -= len(sample.input_ids) + 1
                if free_tokens < 0 and samples:
                    break
                samples.append(sample)
                epoch, waiting = next(conversations)
            yield pack(samples, length=self._length, pad_token_id=self._tokenizer.pad_token_id, epoch=row_epoch)

    def _conversations(self) -> Iterator[tuple[int, Conversation]]:
        for epoch in count():
            rng = np.random.default_rng([self._seed, epoch])
            for index in rng.permutation(len(self._images)):
                yield epoch, converse(self._images, int(index), rng)


def collate(rows: Sequence[Row]) -> Batch:
    """Return rows as one batch; its epoch is that of its first row."""
    return Batch(
        input_ids=torch.stack([row["input_ids"] for row in rows]),
        labels=torch.stack([row["labels"] for row in rows]),
        attention_mask=torch.stack([row["attention_mask"] for row in rows]),
        images=[row["images"] for row in rows],
        epoch=rows[0]["epoch"],
    )


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of several lengths as ids and attention mask, int64 [B, longest], padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
