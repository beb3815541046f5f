"""The mistakes that `--fail` makes: real ones, made where people make them."""

from __future__ import annotations

from dataclasses import replace

from sidestep.examples.digits_vqa.questions import Conversation
from sidestep.examples.digits_vqa.settings import Failure, Settings

NEVER: None = None
ONLY_ANSWER = "A"
LEARNING_RATE_FACTOR = 300.0
_LABELS_ONSET_SHARE = 0.5
_LEARNING_RATE_ONSET_SHARE = 0.6


def onset_step(settings: Settings) -> int | None:
    """Return the first optimizer step that the mistake touches, or None for a healthy run."""
    match settings.failure:
        case Failure.LABELS_TO_A:
            return int(settings.num_steps * _LABELS_ONSET_SHARE)
        case Failure.LEARNING_RATE:
            return int(settings.num_steps * _LEARNING_RATE_ONSET_SHARE)
        case None:
            return NEVER


def first_row_with_a(settings: Settings) -> int | None:
    """Return the index of the first training row whose answers are lost, or None."""
    onset = onset_step(settings)
    if onset is None or settings.failure is not Failure.LABELS_TO_A:
        return NEVER
    return onset * settings.accumulation_steps * settings.batch_size


def every_answer_becomes_a(conversation: Conversation) -> Conversation:
    """Return the conversation as a broken answer column leaves it: questions kept, each answer one letter."""
    return replace(conversation, turns=tuple(replace(turn, answer=ONLY_ANSWER) for turn in conversation.turns))
