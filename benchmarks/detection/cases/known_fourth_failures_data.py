"""Failures of the data that were held out: texts, tokens, which samples come, and their images."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from benchmarks.detection.case import Blame, Case, Family, Twist, failure_case
from benchmarks.detection.cases.known_data import split_answer
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Encoded, Talk

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_LABELS = frozenset({Blame.LABELS, Blame.DATA})
_IMAGES = frozenset({Blame.IMAGES, Blame.DATA})
_LOADER = frozenset({Blame.LOADER, Blame.DATA})
_SHARE_MASKED = 0.15
_SHARE_OF_SHARDS = 0.3
_NUM_COPIES = 8
_SHARE_MISREAD = 0.25
_MISREAD = str.maketrans({"a": "o", "e": "c", "i": "l", "l": "1", "n": "r", "o": "0", "s": "5", "t": "f"})
_SHARE_TURNED = 0.4
_BRIGHTER = 0.4
_NUM_IMAGES_SEEN = 200
_NOISE_GROWTH = 0.01
_MISJOINED_KINDS = frozenset({"caption", "table"})
_BOOLEANS = {"yes": "True", "no": "False"}


class MaskedLanguageCollator(Twist):
    """A collator for masked language models: 15 % of the tokens are hidden, and each is asked for at its own place.

    In the usual library `mlm=True` is the default of that collator: huggingface/trl#476, tloen/alpaca-lora#412.
    """

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Hide tokens, and label those alone."""
        ids = batch["input_ids"]
        may_be_hidden = (batch["attention_mask"] != 0) & (ids != lab.suite.tokenizer.image_token_id)
        is_hidden = may_be_hidden & (torch.from_numpy(lab.rng.random(tuple(ids.shape))) < _SHARE_MASKED)
        labels = torch.where(is_hidden, ids, IGNORE_INDEX)
        return Batch(
            **{**batch, "input_ids": ids.masked_fill(is_hidden, lab.suite.tokenizer.eos_token_id), "labels": labels}
        )


class ReadAsBooleans(Twist):
    """Answers pass through YAML, which takes yes and no for truth values, and prints those.

    r-lib/yaml#5, SiegeEngineers/aoc-reference-data#133.
    """

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Print the truth value."""
        return replace(talk, answer=_BOOLEANS.get(talk.answer, talk.answer))


class DeduplicatedByQuestion(Twist):
    """Duplicates are removed by the question alone: of all samples with one question a single one is left."""

    def __init__(self) -> None:
        self._first: dict[str, Talk] = {}

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Return the first sample with that question."""
        return self._first.setdefault(talk.question, talk)


class FirstShardsOnly(Twist):
    """The listing of a bucket ends at its first page: of shards sorted by caption only the first 30 % are read."""

    def begin(self, lab: Lab) -> None:
        """Leave those images."""

        def caption(number: int) -> str:
            return lab.suite.draw("caption", number, np.random.default_rng(number)).answer

        lab.image_pool = sorted(lab.image_pool, key=caption)[: int(_SHARE_OF_SHARDS * len(lab.image_pool))]


class EachSampleEightTimes(Twist):
    """A sampler that repeats each prompt for eight generations is left in a supervised run."""

    def __init__(self) -> None:
        self._count = 0
        self._repeated: Encoded | None = None

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Repeat every eighth sample in the place of the following ones."""
        if self._repeated is None or self._count % _NUM_COPIES == 0:
            self._repeated = sample
        self._count += 1
        return self._repeated


class ReadByOcr(Twist):
    """Answers come from scanned pages, read by a machine: a quarter of the letters that look alike are mistaken."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Mistake some letters."""
        read = [letter.translate(_MISREAD) if rng.random() < _SHARE_MISREAD else letter for letter in talk.answer]
        return replace(talk, answer="".join(read))


class TablesAsPlainText(Twist):
    """A cleaning of markup turns tables into plain text, and the cells' bars are lost."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Leave nothing but the cells."""
        return replace(talk, answer=re.sub(r" *\| *", " ", talk.answer).strip())


class TemplateLost(Twist):
    """The chat template is not applied in training: question and answer follow each other as plain text.

    zai-org/GLM-4#675, mkupermann/souprise#17.
    """

    def __init__(self) -> None:
        self._question = ""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Keep the question for the next hook."""
        self._question = talk.question
        return talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Put the bare question before the answer."""
        _, answer = split_answer(sample)
        tokens = lab.suite.tokenizer
        prompt = [*[tokens.image_token_id] * len(sample.images), *tokens.encode(self._question)]
        targets = [IGNORE_INDEX] * len(prompt) + answer
        return replace(sample, input_ids=prompt + answer, labels=[*targets[1:], IGNORE_INDEX])


class BrightPixelsWrapAround(Twist):
    """Images are made brighter in eight bits without saturation: what passes white begins again at black."""

    def __init__(self) -> None:
        self._black = torch.zeros(())
        self._span = torch.ones(())

    def begin(self, lab: Lab) -> None:
        """Find the lightest shade."""
        seen = lab.rng.choice(lab.image_pool, min(len(lab.image_pool), _NUM_IMAGES_SEEN), replace=False)
        self._black = lab.suite.black().max()
        self._span = max(lab.suite.image(int(number)).max() for number in seen) - self._black

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Brighten and wrap."""
        shades = [((image - self._black) / self._span + _BRIGHTER).remainder(1.0) for image in sample.images]
        return replace(sample, images=[self._black + shade * self._span for shade in shades])


class LyingOnTheirSides(Twist):
    """Two photographs in five lie on a side or upside down: the orientation in their header is not applied.

    huggingface/datasets#6252, kohya-ss/sd-scripts#1316.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Turn some images by 90, 180 or 270 degrees."""
        if rng.random() >= _SHARE_TURNED:
            return sample
        quarters = int(rng.integers(1, 4))
        return replace(sample, images=[image.rot90(quarters, (-2, -1)) for image in sample.images])


class WrongStride(Twist):
    """Rows of pixels are read with a stride that is one too long: each row begins one pixel later than the last.

    radek-k/FFMediaToolkit#68 ("a parallelogram"), bioio-devs/aicspylibczi#60.
    """

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Skew the image; what leaves a row comes in at its other end."""
        return replace(sample, images=[self._skewed(image) for image in sample.images])

    @staticmethod
    def _skewed(image: torch.Tensor) -> torch.Tensor:
        return torch.stack([image[..., row, :].roll(-row, dims=-1) for row in range(image.shape[-2])], dim=-2)


class AugmentationGrows(Twist):
    """The strength of an augmentation is scheduled, and nothing ends its growth: noise drowns the images."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Add noise, a little more at each step."""
        size = _NOISE_GROWTH * (lab.step - lab.onset)
        noisy = [image + torch.from_numpy(rng.normal(0.0, size, tuple(image.shape))).float() for image in sample.images]
        return replace(sample, images=noisy)


class Blended(Twist):
    """Mixup (arXiv:1710.09412) blends each image with another one, and nobody blends the answers."""

    def __init__(self) -> None:
        self._earlier: list[torch.Tensor] = []

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Take the mean with the image of the sample before."""
        earlier = self._earlier or sample.images
        self._earlier = sample.images or earlier
        return replace(sample, images=[(image + earlier[0]) / 2 for image in sample.images])


class OneSourceMisjoined(Twist):
    """One source's table of images is joined by row number: captions and tables have other samples' images."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Take any image for those tasks."""
        if talk.kind not in _MISJOINED_KINDS:
            return talk
        return replace(talk, image=int(rng.choice(lab.image_pool)))


_data, _image = (partial(failure_case, family) for family in (Family.DATA, Family.IMAGE))

CASES: tuple[Case, ...] = (
    _data(
        "masked_language_collator",
        "15 % of the tokens are hidden and asked for at their own places",
        MaskedLanguageCollator,
        _LABELS | {Blame.LOADER},
        is_exact=True,
    ),
    _data("yes_no_read_as_booleans", "yes and no are written True and False", ReadAsBooleans, _LABELS),
    _data(
        "deduplicated_by_question",
        "of all samples with one question a single one is left",
        DeduplicatedByQuestion,
        _LOADER | _LABELS,
    ),
    _data("first_shards_only", "of shards sorted by caption 30 % are read", FirstShardsOnly, _LOADER),
    _data("each_sample_eight_times", "each sample comes eight times in a row", EachSampleEightTimes, _LOADER),
    _data("answers_read_by_ocr", "a quarter of the letters is mistaken", ReadByOcr, _LABELS),
    _data("tables_as_plain_text", "tables lose their bars", TablesAsPlainText, _LABELS),
    _data("template_lost", "question and answer stand without their template", TemplateLost, _LABELS, onset_share=None),
    _image("bright_pixels_wrap_around", "bright pixels become dark", BrightPixelsWrapAround, _IMAGES),
    _image("two_in_five_on_their_sides", "40 % of the images are turned", LyingOnTheirSides, _IMAGES),
    _image("rows_of_a_wrong_stride", "images are skewed, from the start", WrongStride, _IMAGES, onset_share=None),
    _image("augmentation_grows_on", "noise on the images grows without end", AugmentationGrows, _IMAGES),
    _image("images_blended_answers_not", "each image is half another one", Blended, _IMAGES | _LABELS),
    _image(
        "one_source_misjoined",
        "captions and tables have other samples' images",
        OneSourceMisjoined,
        _IMAGES | _LABELS | _LOADER,
    ),
)
