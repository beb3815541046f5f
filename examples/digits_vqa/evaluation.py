"""How often the model answers held-out questions exactly right, by kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sidestep.examples.digits_vqa.digits import DigitImages
from sidestep.examples.digits_vqa.model import VisionLanguageModel
from sidestep.examples.digits_vqa.packing import left_pad
from sidestep.examples.digits_vqa.prompts import Prompt, prompt_of
from sidestep.examples.digits_vqa.questions import YES_NO_KINDS, Kind
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer

YES_NO = "yes/no"
_CHOICES_SEED = 12


def answer(model: VisionLanguageModel, tokenizer: ChatTokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the ids that the model answers greedily to each prompt, cut at the first end token."""
    device = next(model.parameters()).device
    ids, mask = left_pad([prompt.ids for prompt in prompts], tokenizer.pad_token_id)
    longest = max(len(prompt.answer_ids) for prompt in prompts) + 1
    was_training = model.training
    model.eval()
    generated = model.generate(
        ids.to(device), [prompt.tiles for prompt in prompts], mask.to(device), max_new_tokens=longest, greedy=True
    )
    model.train(was_training)
    return [tokenizer.until_end(row) for row in generated.tolist()]


def held_out_accuracy(model: VisionLanguageModel, tokenizer: ChatTokenizer, held_out: DigitImages) -> dict[str, float]:
    """Return the share of exactly right answers over all held-out images, by kind and for both yes/no kinds together.

    The questions are the same for every run: one of each kind about each image.
    """
    rng = np.random.default_rng(_CHOICES_SEED)
    accuracy: dict[str, float] = {}
    for kind in Kind:
        prompts = [prompt_of(kind, index, held_out, tokenizer, rng) for index in range(len(held_out))]
        answers = answer(model, tokenizer, prompts)
        right = [said == prompt.answer_ids for said, prompt in zip(answers, prompts, strict=True)]
        accuracy[kind.value] = float(np.mean(right))
    accuracy[YES_NO] = float(np.mean([accuracy[kind.value] for kind in YES_NO_KINDS]))
    return accuracy
