"""Healthy trainings whose data, rows or ranks look odd, held out until their first evaluation."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from benchmarks.detection.case import Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.known_optimisation import cross_entropy
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Encoded, Talk, encode_talk
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_SHARE_OF_THIRD_TURNS = 0.5
_HOW_TO_ANSWER = {
    "yes_no": "Answer yes or no.",
    "naming": "Answer the question using a single word or phrase.",
    "choice": "Answer with the option's letter from the given choices directly.",
    "counting": "Answer with the bare result.",
}
_KINDS_WITH_BOXES = ("naming", "caption")
_BOX_UNITS = 1000
_LARGEST_ANGLE_DEGREES = 15.0
_SCALES = (0.85, 1.15)
_CURATED_FROM, _SHARE_CURATED = 0.6, 1 / 3
_ROW_MULTIPLE = 64
_NUM_IMAGES_SEEN = 300
_RATED_BELOW = (0.04, 0.08, 0.15, 0.3)
"""Shares of all images that get at most one, two, three and four stars."""


class SeveralTurns(Twist):
    """Two or three questions are asked about one image, one after another, and every answer is trained on.

    So are the conversations of LLaVA (Liu et al. 2023, arXiv:2304.08485).
    """

    def __init__(self) -> None:
        self._image: int | None = None

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Remember what it is about."""
        self._image = talk.image
        return talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Append the other turns."""
        if self._image is None:
            return sample
        for _ in range(2 if rng.random() < _SHARE_OF_THIRD_TURNS else 1):
            kinds = list(lab.mix)
            asked = lab.suite.draw(kinds[int(rng.integers(len(kinds)))], self._image, rng)
            turn = encode_talk(asked, None, lab.suite.tokenizer)
            sample = replace(sample, input_ids=sample.input_ids + turn.input_ids, labels=sample.labels + turn.labels)
        return sample


class OneExampleFirst(Twist):
    """The same kind of question about another image, with its answer, stands before each question.

    The example is not trained on (Alayrac et al. 2022, arXiv:2204.14198).
    """

    def __init__(self) -> None:
        self._example: Talk | None = None

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Draw the example."""
        self._example = None
        if talk.image is not None:
            self._example = lab.suite.draw(talk.kind, int(rng.choice(lab.image_pool)), rng)
        return talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Put it in front."""
        if self._example is None or self._example.image is None:
            return sample
        shown = encode_talk(self._example, lab.suite.image(self._example.image), lab.suite.tokenizer)
        return replace(
            sample,
            input_ids=shown.input_ids + sample.input_ids,
            labels=[IGNORE_INDEX] * len(shown.labels) + sample.labels,
            images=shown.images + sample.images,
        )


class ShortAnswersAskedFor(Twist):
    """Questions with short answers say so in a sentence at their end (Liu et al. 2023, arXiv:2310.03744)."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Append it."""
        how = _HOW_TO_ANSWER.get(talk.kind)
        return replace(talk, question=f"{talk.question}\n{how}") if how else talk


class BoxesInAnswers(Twist):
    """Names and captions begin with the corners of what is shown (Qwen-VL, Bai et al. 2023, arXiv:2308.12966)."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Ask for the place, and say it."""
        if talk.image is None or talk.kind not in _KINDS_WITH_BOXES:
            return talk
        box = self._box(lab.suite.image(talk.image)[0, 0])
        return replace(talk, question=f"{talk.question} Give its box.", answer=f"{box} {talk.answer}")

    @staticmethod
    def _box(image: torch.Tensor) -> str:
        is_bright = image > (image.min() + image.max()) / 2
        rows, columns = (np.flatnonzero(is_bright.any(dim=way).numpy()) for way in (1, 0))
        units = _BOX_UNITS // image.shape[-1]
        left, top, right, bottom = (int(each) * units for each in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        return f"({left},{top}),({right},{bottom})"


class RotatedAndScaled(Twist):
    """Images are turned by up to 15 degrees and scaled by up to 15 %, anew each time."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Turn and scale."""
        return replace(sample, images=[self._turned(image, lab.suite.black(), rng) for image in sample.images])

    @staticmethod
    def _turned(image: torch.Tensor, black: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        angle = math.radians(float(rng.uniform(-_LARGEST_ANGLE_DEGREES, _LARGEST_ANGLE_DEGREES)))
        scale = float(rng.uniform(*_SCALES))
        cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
        turning = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])
        grid = functional.affine_grid(turning, list(image.shape), align_corners=False)
        return functional.grid_sample(image - black, grid, align_corners=False) + black


class CuratedImagesAtTheEnd(Twist):
    """The last 40 % of the run see the third of all images with the most contrast, announced."""

    def after_step(self, lab: Lab) -> None:
        """Choose them."""
        if lab.step + 1 != int(_CURATED_FROM * lab.num_steps):
            return
        contrasts = np.array([float(lab.suite.image(number).std()) for number in lab.image_pool])
        best = np.argsort(-contrasts, kind="stable")[: int(_SHARE_CURATED * len(contrasts))]
        lab.image_pool = [lab.image_pool[int(place)] for place in best]
        lab.announce("curated_images")


class RightPaddedRows(Twist):
    """Rows are padded on the right, to a multiple of 64 tokens, and most of a row is padding."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Move the padding, and add to it."""
        mask = batch["attention_mask"]
        length = math.ceil(mask.shape[1] / _ROW_MULTIPLE) * _ROW_MULTIPLE
        starts = mask.argmax(dim=1).tolist()
        pad = lab.suite.tokenizer.pad_token_id
        return Batch(
            input_ids=self._moved(batch["input_ids"], starts, length, pad),
            labels=self._moved(batch["labels"], starts, length, IGNORE_INDEX),
            attention_mask=self._moved(mask, starts, length, 0),
            images=batch["images"],
            epoch=batch["epoch"],
        )

    @staticmethod
    def _moved(rows: torch.Tensor, starts: list[int], length: int, filler: int) -> torch.Tensor:
        moved = torch.full((len(rows), length), filler, dtype=rows.dtype)
        for number, start in enumerate(starts):
            moved[number, : rows.shape[1] - start] = rows[number, start:]
        return moved


class WeighedByTokens(Twist):
    """A micro-batch counts by its labelled tokens, so that accumulating changes nothing about the loss."""

    def __init__(self) -> None:
        self._num_labelled: deque[int] = deque()

    def begin(self, lab: Lab) -> None:
        """Look at one step's samples at a time; all are drawn before the first micro-batch."""
        self._num_labelled = deque(maxlen=lab.setup.batch_samples)

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Count the targets."""
        self._num_labelled.append(sum(label != IGNORE_INDEX for label in sample.labels))
        return sample

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Divide by the targets of the whole step."""
        share = int((batch["labels"] != IGNORE_INDEX).sum()) / sum(self._num_labelled)
        return cross_entropy(logits, batch) * share * lab.setup.accumulation_steps * lab.setup.num_ranks


class MostlyFiveStars(Twist):
    """Pictures are rated by their ink, and seven in ten get five stars."""

    def __init__(self) -> None:
        self._limits = np.zeros(len(_RATED_BELOW))

    def begin(self, lab: Lab) -> None:
        """Find how much ink makes which rating."""
        seen = lab.rng.choice(lab.image_pool, min(len(lab.image_pool), _NUM_IMAGES_SEEN), replace=False)
        self._limits = np.quantile([float(lab.suite.image(int(each)).mean()) for each in seen], _RATED_BELOW)

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Rate."""
        if talk.image is None:
            return talk
        stars = 1 + int(np.searchsorted(self._limits, float(lab.suite.image(talk.image).mean())))
        return replace(talk, question="Rate this picture from 1 to 5.", answer=f"{stars} of 5")


_data, _image, _ranks = (partial(healthy_case, family=family) for family in (Family.DATA, Family.IMAGE, Family.RANKS))

CASES: tuple[Case, ...] = (
    _data("several_turns", "two or three questions per image", "a usual conversation", twist=SeveralTurns),
    _data(
        "one_example_first",
        "each sample has two images, and only the second one's answer is trained on",
        "the model shall learn from examples in its context",
        twist=OneExampleFirst,
    ),
    _data(
        "short_answers_asked_for",
        "most tokens of a question say how to answer it",
        "the usual prompts of mixtures with short answers",
        twist=ShortAnswersAskedFor,
    ),
    _data(
        "boxes_in_answers",
        "four answers in ten are mostly numbers",
        "the model shall say where things are",
        twist=BoxesInAnswers,
    ),
    _image("rotated_and_scaled", "images are turned and scaled", "a usual augmentation", twist=RotatedAndScaled),
    _image(
        "curated_images_at_the_end",
        "a third of the images is kept for the rest of the run, announced",
        "the last stage has the best data",
        twist=CuratedImagesAtTheEnd,
    ),
    _data("right_padded_rows", "rows are mostly padding, on the right", "most loaders do", twist=RightPaddedRows),
    _data(
        "weighed_by_tokens",
        "micro-batches of four samples count by their tokens",
        "accumulation as it should be",
        twist=WeighedByTokens,
        setup=Setup(accumulation_steps=6),
    ),
    _ranks(
        "two_ranks_in_four_parts",
        "two ranks accumulate four micro-batches of six samples, at 1.4 times the rate",
        "a usual layout, and the rate follows the batch's root",
        setup=Setup(num_ranks=2, accumulation_steps=4, batch_samples=48, rate_factor=1.4),
    ),
    _data(
        "nine_in_ten_tables",
        "90 % of the samples are tables, and four other tasks share the rest",
        "tables are what the model is for; the rest keeps it able",
        setup=Setup(mix={"table": 0.9, "yes_no": 0.025, "naming": 0.025, "choice": 0.025, "caption": 0.025}),
        is_skewed=True,
    ),
    _data(
        "mostly_five_stars",
        "70 % of the answers are alike, and all of them nearly so",
        "ratings are as people give them",
        twist=MostlyFiveStars,
        setup=Setup(mix={"caption": 1.0}),
        is_skewed=True,
    ),
)
