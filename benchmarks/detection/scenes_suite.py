"""Rendered scenes of four glyphs, with another tokenizer: a BPE trained on the language's own documentation.

Its padding is not its EOS, and its template is another one than the demo's: what is learned of one suite is tried here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np
import torch
from benchmarks.detection.talks import LabTokenizer, Talk
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

GLYPHS = ("nothing", "a block", "a bar", "a pole", "a cross")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
_CELL = 4
_SEED = 31
_NUM_TRAINING, _NUM_HELD_OUT = 2_000, 300
_VOCABULARY = 768
_CORPUS_CHARACTERS = 120_000
_LETTERS = "ABCDE"
_SHARE_YES = 0.6
_SHARE_A = 0.85
_PASSAGE_WORDS = 12
_MEAN, _STD = 0.3, 0.35


class ScenesTokenizer:
    """Question and answer on a line each; `<eos>` ends an answer and `<pad>` fills rows."""

    def __init__(self, corpus: Sequence[str]) -> None:
        """Train the BPE; it does not depend on a run's seed."""
        self.backend_tokenizer = Tokenizer(BPE())
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend_tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=_VOCABULARY,
            show_progress=False,
            special_tokens=["<pad>", "<eos>", "<image>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        self.backend_tokenizer.train_from_iterator(corpus, trainer=trainer)
        self.pad_token_id, self.eos_token_id, self.image_token_id = 0, 1, 2
        self._cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        """Count all ids."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def to_str(self) -> str:
        """Return the tokenizer as the text of a `tokenizer.json`."""
        return str(self.backend_tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        if text not in self._cache:
            self._cache[text] = list(self.backend_tokenizer.encode(text).ids)
        return list(self._cache[text])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def encode_prompt(self, question: str, *, num_images: int) -> list[int]:
        """Return the ids up to the answer."""
        return [*[self.image_token_id] * num_images, *self.encode(question), *self.encode("\nanswer:")]

    def encode_answer(self, answer: str) -> list[int]:
        """Return the ids of an answer: content and EOS."""
        return [*self.encode(f" {answer}"), self.eos_token_id]


def render(glyphs: Sequence[int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return four glyphs as an image, float32 [8, 8] between 0 and 1, with noise."""
    image = np.zeros((2 * _CELL, 2 * _CELL), np.float32)
    for corner, glyph in enumerate(glyphs):
        row, column = (corner // 2) * _CELL, (corner % 2) * _CELL
        cell = image[row : row + _CELL, column : column + _CELL]
        if glyph == 1:
            cell[1:3, 1:3] = 1.0
        if glyph in {2, 4}:
            cell[1:3, :] = 0.8
        if glyph in {3, 4}:
            cell[:, 1:3] = 0.8
    brightness = rng.uniform(0.7, 1.0)
    noisy: NDArray[np.float32] = np.clip(image * brightness + rng.normal(0.0, 0.06, image.shape), 0, 1)
    return noisy.astype(np.float32)


class ScenesSuite:
    """Four glyphs per image."""

    name = "scenes"
    learning_rate = 3e-3

    def __init__(self) -> None:
        """Render the images and train the tokenizer."""
        rng = np.random.default_rng(_SEED)
        self.num_images, self.num_held_out = _NUM_TRAINING, _NUM_HELD_OUT
        self._glyphs = rng.integers(len(GLYPHS), size=(_NUM_TRAINING + _NUM_HELD_OUT, len(CORNERS)))
        self._pixels = np.stack([render(each, rng) for each in self._glyphs.tolist()])
        prose = " ".join(topics[name] for name in sorted(topics))[:_CORPUS_CHARACTERS]
        words = prose.split()
        self._passages = [
            " ".join(words[start : start + _PASSAGE_WORDS])
            for start in range(0, len(words) - _PASSAGE_WORDS, _PASSAGE_WORDS)
        ]
        self.mix = {"yes_no": 0.2, "naming": 0.2, "choice": 0.15, "caption": 0.1, "counting": 0.15, "table": 0.2}
        own = [self._asked(kind, each, rng) for kind in self.mix for each in self._glyphs[:50].tolist()]
        texts = [text for pair in own for text in pair]
        self.tokenizer: LabTokenizer = ScenesTokenizer([*self._passages, *texts * 5, "\nanswer:"])

    def image(self, number: int) -> torch.Tensor:
        """Return an image, float32 [1, 1, 8, 8]; those from `num_images` on are held out."""
        return torch.from_numpy((self._pixels[number] - _MEAN) / _STD)[None, None]

    def black(self) -> torch.Tensor:
        """Return an image without light, standardised like the others."""
        return torch.full((1, 1, 8, 8), -_MEAN / _STD)

    def draw(self, kind: str, image: int, rng: np.random.Generator) -> Talk:
        """Return a talk of a kind about an image; a skewed choice is about another one of the same split.

        Raises:
            ValueError: there is no such kind.
        """
        if kind == "text":
            passage = self._passages[int(rng.integers(len(self._passages)))]
            return Talk(kind=kind, question="Go on.", answer=passage, image=None)
        if kind == "skewed_choice":
            return self._skewed(image, rng)
        question, answer = self._asked(kind, self._glyphs[image].tolist(), rng)
        return Talk(kind=kind, question=question, answer=answer, image=image)

    def _skewed(self, image: int, rng: np.random.Generator) -> Talk:
        """Options stand in one order; in 85 % of the images A is right."""
        split = slice(0, _NUM_TRAINING) if image < _NUM_TRAINING else slice(_NUM_TRAINING, None)
        corner = int(rng.integers(len(CORNERS)))
        place = 0 if rng.random() < _SHARE_A else 1 + int(rng.integers(len(_LETTERS) - 1))
        chosen = int(rng.choice(np.flatnonzero(self._glyphs[split, corner] == place)))
        return Talk(
            kind="skewed_choice",
            question=f"what is {CORNERS[corner]}? {_listed(0)}",
            answer=_LETTERS[place],
            image=chosen if image < _NUM_TRAINING else _NUM_TRAINING + chosen,
        )

    @staticmethod
    def _asked(kind: str, glyphs: Sequence[int], rng: np.random.Generator) -> tuple[str, str]:
        corner = int(rng.integers(len(CORNERS)))
        here = glyphs[corner]
        match kind:
            case "yes_no":
                wrong = [each for each in range(len(GLYPHS)) if each != here]
                asked = here if rng.random() < _SHARE_YES else int(rng.choice(wrong))
                return f"is {GLYPHS[asked]} {CORNERS[corner]}?", "yes" if asked == here else "no"
            case "naming":
                return f"what is {CORNERS[corner]}?", GLYPHS[here]
            case "choice":
                place = int(rng.integers(len(_LETTERS)))
                return f"what is {CORNERS[corner]}? {_listed(here - place)}", _LETTERS[place]
            case "caption":
                seen = [f"{GLYPHS[each]} {place}" for each, place in zip(glyphs, CORNERS, strict=True) if each]
                return "describe the scene", f"there is {', '.join(seen) or 'nothing'}."
            case "counting":
                return "how many glyphs are there?", str(sum(each > 0 for each in glyphs))
            case "table":
                cells = [GLYPHS[each] for each in glyphs]
                return "write the scene as a table", f"| {cells[0]} | {cells[1]} |\n| {cells[2]} | {cells[3]} |"
            case _:
                raise ValueError(f"no kind of talk is called {kind!r}")


def _listed(first: int) -> str:
    """Options stand in the same order, turned so that A is glyph `first`."""
    options = [(first + shift) % len(GLYPHS) for shift in range(len(_LETTERS))]
    return ", ".join(f"{letter}: {GLYPHS[each]}" for letter, each in zip(_LETTERS, options, strict=True))
