"""Questions about one or two digits, with their true answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from sidestep.examples.digits_vqa.digits import DigitImages

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK_WORDS = ("thin", "medium", "bold")
STROKES = (
    "a closed loop",
    "a straight line",
    "a curve, then a flat line",
    "two open curves, one above the other",
    "a corner, then a straight line through it",
    "a corner, then an open curve, then a flat bar on top",
    "a curve that ends in a loop",
    "a flat line, then a slanted one",
    "two closed loops, one above the other",
    "a loop, then a line down",
)
_SHARE_OF_PAIRS = 0.25
_MAX_TURNS = 3
_NUM_IS_IT_DRAWN = 5


class Kind(StrEnum):
    """What a question asks for."""

    NAME = "name"
    IS_IT = "is it X"
    EVEN = "even"
    COUNT = "count up"
    CAPTION = "caption"
    STROKES = "strokes"
    COMPARE = "compare two"
    NAME_BOTH = "name both"


SINGLE_KINDS = (Kind.NAME, Kind.IS_IT, Kind.EVEN, Kind.COUNT, Kind.CAPTION, Kind.STROKES)
PAIR_KINDS = (Kind.COMPARE, Kind.NAME_BOTH)
YES_NO_KINDS = (Kind.IS_IT, Kind.EVEN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One question and its true answer."""

    kind: Kind
    """What is asked for."""
    question: str
    """What the user says, without template and image placeholders."""
    answer: str
    """What the assistant should say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One or two images and the turns about them."""

    image_indices: tuple[int, ...]
    """Which images of the split stand before the first question."""
    turns: tuple[Turn, ...]
    """Question and answer, in the order in which they are said."""


def _number_words(first: int) -> str:
    return " ".join(WORDS[first:])


def single_turn(kind: Kind, name: int, ink_level: int, asked: int) -> Turn:
    """Return the turn of `kind` about one image that shows `name`; `asked` is the X of "is it X"."""
    match kind:
        case Kind.NAME:
            return Turn(kind=kind, question="Which digit is this?", answer=WORDS[name])
        case Kind.IS_IT:
            return Turn(kind=kind, question=f'Is this "{WORDS[asked]}"?', answer="yes" if asked == name else "no")
        case Kind.EVEN:
            return Turn(kind=kind, question="Is this digit even?", answer="no" if name % 2 else "yes")
        case Kind.COUNT:
            return Turn(kind=kind, question="Count up from this digit.", answer=_number_words(name))
        case Kind.CAPTION:
            caption = f"This is a handwritten {WORDS[name]} in {INK_WORDS[ink_level]} ink."
            return Turn(kind=kind, question="Describe the picture.", answer=caption)
        case Kind.STROKES:
            return Turn(kind=kind, question="Which strokes make this digit?", answer=STROKES[name])
        case _:
            raise ValueError(f"{kind} asks about two images")


def pair_turn(kind: Kind, first: int, second: int) -> Turn:
    """Return the turn of `kind` about two images that show `first` and `second`."""
    match kind:
        case Kind.COMPARE:
            answer = "both are equal" if first == second else "the first one" if first > second else "the second one"
            return Turn(kind=kind, question="Which digit is larger?", answer=answer)
        case Kind.NAME_BOTH:
            return Turn(kind=kind, question="Which two digits are these?", answer=f"{WORDS[first]} and {WORDS[second]}")
        case _:
            raise ValueError(f"{kind} asks about one image")


def every_text() -> Iterator[str]:
    """Yield every question and answer that can occur, in a fixed order: the tokenizer is trained from them."""
    for name in range(len(WORDS)):
        for kind in SINGLE_KINDS:
            for ink_level in range(len(INK_WORDS)):
                for asked in range(len(WORDS)):
                    turn = single_turn(kind, name, ink_level, asked)
                    yield from (turn.question, turn.answer)
        for second in range(len(WORDS)):
            for kind in PAIR_KINDS:
                turn = pair_turn(kind, name, second)
                yield from (turn.question, turn.answer)


def ask(kind: Kind, images: DigitImages, index: int, rng: np.random.Generator) -> Conversation:
    """Return a conversation of one turn of `kind` that begins with image `index`, its open choices drawn from `rng`."""
    name = int(images.names[index])
    if kind in PAIR_KINDS:
        other = int(rng.integers(len(images)))
        return Conversation(image_indices=(index, other), turns=(pair_turn(kind, name, int(images.names[other])),))
    return Conversation(image_indices=(index,), turns=(_drawn_single_turn(kind, images, index, rng),))


def converse(images: DigitImages, index: int, rng: np.random.Generator) -> Conversation:
    """Return a conversation of several turns that begins with image `index`, drawn from `rng`."""
    if rng.random() < _SHARE_OF_PAIRS:
        other = int(rng.integers(len(images)))
        first, second = int(images.names[index]), int(images.names[other])
        kinds = [PAIR_KINDS[position] for position in rng.permutation(len(PAIR_KINDS))]
        turns = tuple(pair_turn(kind, first, second) for kind in kinds[: int(rng.integers(1, len(kinds) + 1))])
        return Conversation(image_indices=(index, other), turns=turns)
    # To match an image with a word is the hardest to learn here, so it is asked more often, also twice in a row.
    pool = [*SINGLE_KINDS, *[Kind.IS_IT] * (_NUM_IS_IT_DRAWN - 1)]
    num_turns = int(rng.integers(1, _MAX_TURNS + 1))
    chosen = [pool[position] for position in rng.permutation(len(pool))[:num_turns]]
    turns = tuple(_drawn_single_turn(kind, images, index, rng) for kind in chosen)
    return Conversation(image_indices=(index,), turns=turns)


def _drawn_single_turn(kind: Kind, images: DigitImages, index: int, rng: np.random.Generator) -> Turn:
    name = int(images.names[index])
    # Half of "is it X" is true: a tenth, as chance has it, would teach the model to say "no".
    asked = name if rng.random() < 0.5 else int(rng.choice([other for other in range(len(WORDS)) if other != name]))
    return single_turn(kind, name, int(images.ink_levels[index]), asked)
