"""Samples as people write them, and as ids: what all suites share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX

KINDS = ("yes_no", "naming", "choice", "skewed_choice", "caption", "counting", "table", "text")
"""What is asked for, in every suite: yes or no (60/40); a name; a letter among options; the same with 85 % "A"; a
sentence; a list; rows of cells; a text without image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """One question and its answer, about one image or none."""

    kind: str
    """One of `KINDS`."""
    question: str
    answer: str
    image: int | None
    """Number of the image in the suite's pool; None: the sample has no image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One sample in ids, labels and pixels."""

    input_ids: list[int]
    labels: list[int]
    """`labels[t]` is the target of `logits[t]`, that is `input_ids[t + 1]`, or -100."""
    images: list[torch.Tensor]
    """None, or one float32 tensor [1, 1, 8, 8]."""
    kind: str = ""


class LabTokenizer(Protocol):
    """What the lab asks of a tokenizer; `sidestep.attach` gets the same object."""

    eos_token_id: int
    pad_token_id: int
    image_token_id: int

    def __len__(self) -> int:
        """Count all ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        ...

    def encode_prompt(self, question: str, *, num_images: int) -> list[int]:
        """Return the ids up to the answer, image placeholders included."""
        ...

    def encode_answer(self, answer: str) -> list[int]:
        """Return the ids that are trained on: content, EOS, and what the template puts after it."""
        ...


def encode_talk(talk: Talk, image: torch.Tensor | None, tokenizer: LabTokenizer) -> Encoded:
    """Return a talk in ids; labels are shifted already, and stand at the answer alone."""
    prompt = tokenizer.encode_prompt(talk.question, num_images=0 if image is None else 1)
    answer = tokenizer.encode_answer(talk.answer)
    targets = [IGNORE_INDEX] * len(prompt) + answer
    return Encoded(
        input_ids=prompt + answer,
        labels=[*targets[1:], IGNORE_INDEX],
        images=[] if image is None else [image],
        kind=talk.kind,
    )
