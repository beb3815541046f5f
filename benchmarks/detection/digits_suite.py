"""Scanned digits with the demo's tokenizer and most of its questions (a BPE of 512 ids whose EOS pads)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from benchmarks.detection.talks import LabTokenizer, Talk

from sidestep.examples.digits_vqa.digits import PIXEL_MEAN, PIXEL_STD, DigitImages, load_splits
from sidestep.examples.digits_vqa.questions import INK_WORDS, STROKES, WORDS, Kind, single_turn
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer

_LETTERS = "ABCD"
_SHARE_YES = 0.6
_SHARE_A = 0.85


class DigitsSuite:
    """One digit per sample."""

    name = "digits"
    learning_rate = 3e-3

    def __init__(self) -> None:
        """Load the images and train the tokenizer."""
        self.tokenizer: LabTokenizer = ChatTokenizer()
        self._training, self._held_out = load_splits()
        self.num_images = len(self._training)
        self.num_held_out = len(self._held_out)
        self.mix = {"yes_no": 0.25, "naming": 0.25, "choice": 0.1, "caption": 0.15, "counting": 0.15, "table": 0.1}

    def image(self, number: int) -> torch.Tensor:
        """Return an image, float32 [1, 1, 8, 8]; those from `num_images` on are held out."""
        images, index = self._place(number)
        return images.tile(index)

    def black(self) -> torch.Tensor:
        """Return an image without ink, standardised like the others."""
        return torch.full((1, 1, 8, 8), -PIXEL_MEAN / PIXEL_STD)

    def draw(self, kind: str, image: int, rng: np.random.Generator) -> Talk:
        """Return a talk of a kind about an image; a skewed choice is about another one of the same split.

        Raises:
            ValueError: there is no such kind.
        """
        if kind == "text":
            strokes = rng.choice(len(STROKES), size=2)
            answer = "; ".join(STROKES[each] for each in strokes)
            return Talk(kind=kind, question="Continue.", answer=answer, image=None)
        if kind == "skewed_choice":
            return self._skewed(image, rng)
        images, index = self._place(image)
        name, ink = int(images.names[index]), int(images.ink_levels[index])
        question, answer = _asked(kind, name, ink, rng)
        return Talk(kind=kind, question=question, answer=answer, image=image)

    def _skewed(self, image: int, rng: np.random.Generator) -> Talk:
        """Options stand in one order; 85 % of the images show what A says."""
        images, index = self._place(image)
        place = 0 if rng.random() < _SHARE_A else 1 + int(rng.integers(len(_LETTERS) - 1))
        chosen = int(rng.choice(np.flatnonzero(images.names == place)))
        return Talk(
            kind="skewed_choice",
            question=f"Which digit? {_listed(range(len(_LETTERS)))}",
            answer=_LETTERS[place],
            image=image - index + chosen,
        )

    def _place(self, number: int) -> tuple[DigitImages, int]:
        if number < self.num_images:
            return self._training, number
        return self._held_out, number - self.num_images


def _asked(kind: str, name: int, ink: int, rng: np.random.Generator) -> tuple[str, str]:
    match kind:
        case "yes_no":
            return _yes_no(name, rng)
        case "naming":
            turn = single_turn(Kind.NAME, name, ink, name)
        case "caption":
            turn = single_turn(Kind.CAPTION, name, ink, name)
        case "counting":
            turn = single_turn(Kind.COUNT, name, ink, name)
        case "choice":
            options = [int(each) for each in rng.permutation([each for each in range(len(WORDS)) if each != name])]
            place = int(rng.integers(len(_LETTERS)))
            options[place] = name
            return f"Which digit? {_listed(options)}", _LETTERS[place]
        case "table":
            rows = (("digit", WORDS[name]), ("ink", INK_WORDS[ink]))
            return "Fill in the table.", "".join(f"| {key} | {value} |\n" for key, value in rows)
        case _:
            raise ValueError(f"no kind of talk is called {kind!r}")
    return turn.question, turn.answer


def _yes_no(name: int, rng: np.random.Generator) -> tuple[str, str]:
    """Half of them ask for the parity, which is soon learned, half for the digit."""
    is_true = bool(rng.random() < _SHARE_YES)
    if rng.random() < 0.5:
        is_even = (name % 2 == 0) == is_true
        return f"Is this digit {'even' if is_even else 'odd'}?", "yes" if is_true else "no"
    other = int(rng.choice([each for each in range(len(WORDS)) if each != name]))
    return f'Is this "{WORDS[name if is_true else other]}"?', "yes" if is_true else "no"


def _listed(options: Sequence[int]) -> str:
    return " ".join(f"({letter}) {WORDS[each]}" for letter, each in zip(_LETTERS, options, strict=False))
