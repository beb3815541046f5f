"""Held-out prompts, cut before the answer: for the hooks to generate from, and for the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sidestep.examples.digits_vqa.digits import DigitImages
from sidestep.examples.digits_vqa.questions import Kind, ask
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer

_MIXED_SEED = 11


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A question about held-out images, and the answer that should come."""

    kind: Kind
    """What is asked for."""
    question: str
    """What the user says."""
    answer: str
    """The true answer."""
    ids: list[int]
    """The conversation up to and with the assistant's prefix."""
    answer_ids: list[int]
    """The true answer's content."""
    tiles: list[torch.Tensor]
    """One float32 tensor [1, 1, 8, 8] per image."""
    picture: NDArray[np.uint8]
    """The images for a person, uint8 [H, W]."""


def prompt_of(
    kind: Kind, index: int, images: DigitImages, tokenizer: ChatTokenizer, rng: np.random.Generator
) -> Prompt:
    """Return a prompt of `kind` about image `index`, its open choices drawn from `rng`."""
    conversation = ask(kind, images, index, rng)
    turn = conversation.turns[0]
    return Prompt(
        kind=kind,
        question=turn.question,
        answer=turn.answer,
        ids=tokenizer.encode_prompt(turn.question, num_images=len(conversation.image_indices)),
        answer_ids=tokenizer.encode(turn.answer),
        tiles=[images.tile(image) for image in conversation.image_indices],
        picture=images.picture(conversation.image_indices),
    )


def mixed_prompts(images: DigitImages, tokenizer: ChatTokenizer, num_prompts: int) -> list[Prompt]:
    """Return prompts of all kinds in turn, the same for every seed of a run.

    They must be mixed: a healthy model asked the same yes/no question a hundred times looks collapsed.
    """
    rng = np.random.default_rng(_MIXED_SEED)
    kinds = list(Kind)
    indices = rng.choice(len(images), size=num_prompts, replace=num_prompts > len(images))
    return [
        prompt_of(kinds[position % len(kinds)], int(index), images, tokenizer, rng)
        for position, index in enumerate(indices)
    ]
