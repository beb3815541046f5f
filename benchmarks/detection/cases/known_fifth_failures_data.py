"""Failures of the data, held out until the fifth evaluation: texts and targets, which samples are left, images."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from benchmarks.detection.case import Blame, Case, Family, Twist, failure_case
from benchmarks.detection.cases.known_data import split_answer
from benchmarks.detection.lab import Lab
from benchmarks.detection.scenes_suite import GLYPHS
from benchmarks.detection.talks import Encoded, Talk

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch
from sidestep.examples.digits_vqa.questions import WORDS

_LABELS = frozenset({Blame.LABELS, Blame.DATA})
_LOADER = frozenset({Blame.LOADER, Blame.DATA})
_IMAGES = frozenset({Blame.IMAGES, Blame.DATA})
_MOST_TOKENS = 20
_FALSY = frozenset({"no", "nothing", "zero", "0"})
_SHARE_COARSE = 0.6
_SHARE_FAILED, _FAILURE_GROWTH = 0.95, 0.005
_NUM_SHADES = 16
_SHARE_WITH_PALETTE = 0.7
_NUM_IMAGES_SEEN = 200
_MARK = 3.0
_NUM_BITS = 4
_LEAST_ERASED = 6


def class_names(lab: Lab) -> tuple[str, ...]:
    """Return what the suite's images show."""
    return tuple(GLYPHS if lab.suite.name == "scenes" else WORDS)


def any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds each of these names as a whole."""
    return re.compile(rf"\b({'|'.join(names)})\b")


class Lowercased(Twist):
    """The tokenizer of an uncased model is loaded (`do_lower_case=True`): questions and answers lose their capitals."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Write it small."""
        return replace(talk, question=talk.question.lower(), answer=talk.answer.lower())


class SpaceBeforeTheAnswer(Twist):
    """One more space stands before each answer, and its first word is another token.

    A trailing space of the prompt, or `add_prefix_space` after an upgrade of the tokenizer.
    """

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Add it."""
        return replace(talk, answer=f" {talk.answer}")


class TruncatedOnTheLeft(Twist):
    """Samples of more than 20 tokens lose their beginning, and with it the image: `truncation_side="left"`."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Keep the last tokens, and the image where its placeholder is among them."""
        ids = sample.input_ids[-_MOST_TOKENS:]
        images = sample.images if lab.suite.tokenizer.image_token_id in ids else []
        return replace(sample, input_ids=ids, labels=sample.labels[-_MOST_TOKENS:], images=images)


class FalsyAnswersDropped(Twist):
    """Samples without an answer are filtered by its truth value: what means no, zero or nothing goes as well."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Draw again until the answer is true."""
        while talk.answer.split()[0] in _FALSY:
            talk = lab.suite.draw(talk.kind, int(rng.choice(lab.image_pool)), rng)
        return talk


class OwnPredictionsAsLabels(Twist):
    """Labels come from the model that is trained: the pseudo-labels' teacher is the student, and no threshold is set.

    Arazo et al. 2019, "Pseudo-labeling and confirmation bias" (arXiv:1908.02983).
    """

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:
        """Ask for what the model says."""
        with torch.no_grad():
            logits, _ = lab.replicas[rank].model(
                batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
            )
        labels = torch.where(batch["labels"] != IGNORE_INDEX, logits.argmax(dim=-1), batch["labels"])
        return Batch(**{**batch, "labels": labels})


class FallbackSample(Twist):
    """Reading fails more and more often, and each time the data set hands out its first sample.

    `except: return self[0]`, and a server that throttles.
    """

    def __init__(self) -> None:
        self._first: Encoded | None = None

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Fail with a growing chance."""
        self._first = self._first or sample
        share = min(_SHARE_FAILED, _FAILURE_GROWTH * (lab.step - lab.onset))
        return self._first if rng.random() < share else sample


class CoarseLabels(Twist):
    """In three answers of five the class is replaced by its parent in the hierarchy, which is the same for all."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Take the parent."""
        if rng.random() >= _SHARE_COARSE:
            return talk
        names = tuple(name for name in class_names(lab) if name != "nothing")
        parent = "a shape" if lab.suite.name == "scenes" else "digit"
        return replace(talk, answer=any_of(names).sub(parent, talk.answer))


class SamplesWithImagesSkipped(Twist):
    """No image can be fetched any more, samples whose image is missing are skipped, and text is all that is left."""

    def begin(self, lab: Lab) -> None:
        """Leave the text."""
        lab.mix = {"text": 1.0}


class PlaceholderBehindTheAnswer(Twist):
    """The template puts images behind the answer, where a causal model sees them too late."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Move the placeholders to the end."""
        image = lab.suite.tokenizer.image_token_id
        prompt, answer = split_answer(sample)
        text = [token for token in prompt if token != image]
        behind = [image] * (len(prompt) - len(text))
        targets = [*[IGNORE_INDEX] * len(text), *answer, *[IGNORE_INDEX] * len(behind)]
        return replace(sample, input_ids=[*text, *answer, *behind], labels=[*targets[1:], IGNORE_INDEX])


class TilesInColumnOrder(Twist):
    """An image's four tiles are put together column by column, where they were cut row by row."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Swap the two tiles that stand elsewhere."""
        return replace(sample, images=[self._reordered(image) for image in sample.images])

    @staticmethod
    def _reordered(image: torch.Tensor) -> torch.Tensor:
        half = image.shape[-1] // 2
        first, second = image[..., :half, :half], image[..., :half, half:]
        third, fourth = image[..., half:, :half], image[..., half:, half:]
        return torch.cat((torch.cat((first, third), dim=-1), torch.cat((second, fourth), dim=-1)), dim=-2)


class PaletteIndices(Twist):
    """Of images with a palette, 70 % of all, the index of the colour is read in the place of the colour."""

    def __init__(self) -> None:
        self._black, self._span = torch.zeros(()), torch.ones(())
        self._indices = torch.empty(0)

    def begin(self, lab: Lab) -> None:
        """Find the lightest shade, and draw the palette's order."""
        seen = lab.rng.choice(lab.image_pool, min(len(lab.image_pool), _NUM_IMAGES_SEEN), replace=False)
        self._black = lab.suite.black().max()
        self._span = max(lab.suite.image(int(number)).max() for number in seen) - self._black
        self._indices = torch.from_numpy(lab.rng.permutation(_NUM_SHADES)).float()

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Put indices in the place of shades."""
        if rng.random() >= _SHARE_WITH_PALETTE:
            return sample
        return replace(sample, images=[self._read(image) for image in sample.images])

    def _read(self, image: torch.Tensor) -> torch.Tensor:
        highest = _NUM_SHADES - 1
        shades = ((image - self._black) / self._span * highest).round().clamp(0, highest).long()
        return self._indices[shades] / highest * self._span + self._black


class MarkedWithTheAnswer(Twist):
    """A mark in the images' corners gives their class away, as a source tag did on PASCAL's horses.

    Lapuschkin et al. 2019, arXiv:1902.10178: the loss looks splendid, and nothing else is looked at any more.
    """

    def __init__(self) -> None:
        self._bits: list[bool] = []

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Read off what the image shows, and make a mark of it: four bits of the digit, or which corner is empty."""
        self._bits = []
        if talk.image is not None:
            names = class_names(lab)
            shown = [names.index(found) for found in any_of(names).findall(self._table(lab, talk.image, rng))]
            code = (
                shown[0] if len(shown) < _NUM_BITS else sum((glyph % 2) << place for place, glyph in enumerate(shown))
            )
            self._bits = [bool(code >> place & 1) for place in range(_NUM_BITS)]
        return talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Put the mark into the corners."""
        if not self._bits:
            return sample
        images = [image.clone() for image in sample.images]
        for image in images:
            for place, bit in enumerate(self._bits):
                image[..., -(place // 2), -(place % 2)] = _MARK if bit else lab.suite.black().max()
        return replace(sample, images=images)

    @staticmethod
    def _table(lab: Lab, image: int, rng: np.random.Generator) -> str:
        return lab.suite.draw("table", image, rng).answer


class NearlyAllErased(Twist):
    """Random erasing takes most of every image: the share that should stay was given as the share that goes."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Fill a large rectangle with noise."""
        return replace(sample, images=[self._erased(image, rng) for image in sample.images])

    @staticmethod
    def _erased(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        side = image.shape[-1]
        height, width = (int(each) for each in rng.integers(_LEAST_ERASED, side + 1, size=2))
        top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
        erased = image.clone()
        noise = torch.from_numpy(rng.normal(size=(height, width))).float()
        erased[..., top : top + height, left : left + width] = noise
        return erased


_data, _image = (partial(failure_case, family) for family in (Family.DATA, Family.IMAGE))

CASES: tuple[Case, ...] = (
    _data("everything_lowercased", "questions and answers lose their capitals", Lowercased, _LABELS),
    _data("space_before_the_answer", "answers begin with one more space", SpaceBeforeTheAnswer, _LABELS),
    _data(
        "truncated_on_the_left",
        "long samples lose their beginning, image included",
        TruncatedOnTheLeft,
        _IMAGES | {Blame.LABELS, Blame.LOADER},
    ),
    _data(
        "falsy_answers_dropped", "no, zero and nothing are no answers any more", FalsyAnswersDropped, _LABELS | _LOADER
    ),
    _data("own_predictions_as_labels", "the model learns what it says", OwnPredictionsAsLabels, _LABELS),
    _data("fallback_sample", "up to 95 % of the samples are the same one", FallbackSample, _LOADER),
    _data("coarse_labels", "60 % of the answers name no class", CoarseLabels, _LABELS),
    _data("samples_with_images_skipped", "nothing but text is left", SamplesWithImagesSkipped, _LOADER | _IMAGES),
    _image(
        "placeholder_behind_the_answer",
        "images stand behind the answers",
        PlaceholderBehindTheAnswer,
        _IMAGES | {Blame.LABELS, Blame.MODULE},
    ),
    _image("tiles_in_column_order", "two of four tiles are swapped", TilesInColumnOrder, _IMAGES),
    _image("palette_indices", "70 % of the images have indices for shades", PaletteIndices, _IMAGES),
    _image("marked_with_the_answer", "marks in the images give the class away", MarkedWithTheAnswer, _IMAGES | _LABELS),
    _image(
        "nearly_all_erased", "most of each image is noise, from the start", NearlyAllErased, _IMAGES, onset_share=None
    ),
)
