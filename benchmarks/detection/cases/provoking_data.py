"""Healthy trainings that provoke the detectors: odd data, odd batches, odd images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from benchmarks.detection.case import Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.provoking_optimisers import HALF
from benchmarks.detection.lab import Lab, Suite
from benchmarks.detection.talks import Encoded, LabTokenizer, Talk
from torch import nn

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_NUM_CODES, _FIRST_CODE, _SHARE_OF_NOISE = 12, 20, 0.75
_LONG_SHARE, _FEW_SAMPLES, _MANY_SAMPLES = 0.4, 10, 48
_SHARE_OF_PROSE = 0.04
_SHARD_EVERY, _SHARD_FIRST, _SHARD_STEPS = 60, 10, 8
_SHARE_POSITIVE = 0.015
_IMAGES_OF_A_STEP = 2
_BYTES = 255.0
_STEPS_OF_AN_EPOCH = 30
_SHARE_WRONG = 0.4
_NUM_TURNS = 3


def _answer(sample: Encoded) -> list[int]:
    return [label for label in sample.labels if label != IGNORE_INDEX]


def _prompt(sample: Encoded) -> list[int]:
    first = next(place for place, label in enumerate(sample.labels) if label != IGNORE_INDEX)
    return sample.input_ids[: first + 1]


def _made(prompt: list[int], answer: list[int], images: list[torch.Tensor], kind: str) -> Encoded:
    """Return a sample whose answer alone is labelled."""
    labels = [*[IGNORE_INDEX] * (len(prompt) - 1), *answer, IGNORE_INDEX]
    return Encoded(input_ids=[*prompt, *answer], labels=labels, images=images, kind=kind)


class TwoViews(Twist):
    """Each sample has two images of the same thing, the second one mirrored: two cameras."""

    def __init__(self) -> None:
        self._question = ""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """See what is asked."""
        self._question = talk.question
        return talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Add the other view."""
        images = [*sample.images, *[image.flip(-1) for image in sample.images]]
        prompt = lab.suite.tokenizer.encode_prompt(self._question, num_images=len(images))
        return _made(prompt, _answer(sample), images, sample.kind)


class _Other:
    """What another object is, but for a few attributes; for the tokenizer and the suite of a run."""

    def __init__(self, like: object, **changes: object) -> None:
        """Put `changes` in the place of what `like` has."""
        self._like = like
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._like, name)

    def __len__(self) -> int:
        return len(cast("LabTokenizer", self._like))


class TaggedPrompts(Twist):
    """A prompt ends with one token that says which form of answer is wanted, and nobody trains on it."""

    _TAGS = "ABCDEFGH"

    def begin(self, lab: Lab) -> None:
        """Put it behind the template, in samples that are generated from as well."""
        tokens = lab.suite.tokenizer

        def tagged(question: str, *, num_images: int) -> list[int]:
            tag = self._TAGS[sum(question.split(maxsplit=1)[0].encode()) % len(self._TAGS)]
            return [*tokens.encode_prompt(question, num_images=num_images), tokens.encode(tag)[-1]]

        lab.suite = cast("Suite", _Other(lab.suite, tokenizer=_Other(tokens, encode_prompt=tagged)))


class CodesOfASound(Twist):
    """Answers are codes of a neural codec, which are nearly evenly used and hard to foretell (arXiv:2210.13438)."""

    def begin(self, lab: Lab) -> None:
        """Write codes for each answer, most of which are noise."""
        tokens, rng = lab.suite.tokenizer, lab.rng
        size = len(tokens) - _FIRST_CODE

        def in_codes(answer: str) -> list[int]:
            own = np.random.default_rng(list(answer.encode())).integers(size, size=_NUM_CODES)
            codes = np.where(rng.random(_NUM_CODES) < _SHARE_OF_NOISE, rng.integers(size, size=_NUM_CODES), own)
            return [*(codes + _FIRST_CODE).tolist(), tokens.eos_token_id]

        lab.suite = cast("Suite", _Other(lab.suite, tokenizer=_Other(tokens, encode_answer=in_codes)))


class SoManyTokens(Twist):
    """A step has samples of one length, and as many as make up its tokens: 48 short ones or 10 long ones."""

    def begin(self, lab: Lab) -> None:
        """Draw the first."""
        self._draw(lab)

    def after_step(self, lab: Lab) -> None:
        """Draw the next."""
        self._draw(lab)

    @staticmethod
    def _draw(lab: Lab) -> None:
        is_long = bool(lab.rng.random() < _LONG_SHARE)
        lab.mix = {"caption": 0.5, "table": 0.5} if is_long else {"yes_no": 0.5, "naming": 0.5}
        lab.setup = replace(lab.setup, batch_samples=_FEW_SAMPLES if is_long else _MANY_SAMPLES)


class ProseNowAndThen(Twist):
    """In one of 25 steps there is nothing but pieces of prose, all of it labelled, and none of them ends."""

    def after_step(self, lab: Lab) -> None:
        """Draw what comes next."""
        is_prose = bool(lab.rng.random() < _SHARE_OF_PROSE)
        lab.mix = {"text": 1.0} if is_prose else dict(lab.setup.mix or lab.suite.mix)

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Take question and end from prose."""
        if sample.kind != "text":
            return sample
        answer = _answer(sample)
        ids = answer[: answer.index(lab.suite.tokenizer.eos_token_id)]
        return Encoded(input_ids=ids, labels=[*ids[1:], IGNORE_INDEX], images=[], kind=sample.kind)


class RareShards(Twist):
    """Every 60 steps come eight of text alone: a shard that the shuffling buffer is too small for."""

    def after_step(self, lab: Lab) -> None:
        """Open the next step's shard."""
        is_rare = 0 <= (lab.step + 1) % _SHARD_EVERY - _SHARD_FIRST < _SHARD_STEPS
        lab.mix = {"text": 1.0} if is_rare else dict(lab.setup.mix or lab.suite.mix)


class RarePositives(Twist):
    """Of 1,000 answers 985 are "no": defects are rare."""

    def begin(self, lab: Lab) -> None:
        """Draw until an answer is what it should be, of samples that are generated from as well."""
        suite = lab.suite

        def drawn(kind: str, image: int, rng: np.random.Generator) -> Talk:
            wanted = "yes" if rng.random() < _SHARE_POSITIVE else "no"
            while (talk := suite.draw(kind, image, rng)).answer != wanted:
                pass
            return talk

        lab.suite = cast("Suite", _Other(suite, draw=drawn))


class AllQuestionsOfAnImage(Twist):
    """A step has two images and twelve questions about each, so that each image is encoded once for all of them."""

    def __init__(self) -> None:
        self._images: list[int] = []
        self._drawn = 0

    def begin(self, lab: Lab) -> None:
        """Draw the first images."""
        self.after_step(lab)

    def after_step(self, lab: Lab) -> None:
        """Draw the next step's images."""
        self._images = [int(each) for each in lab.rng.choice(lab.image_pool, _IMAGES_OF_A_STEP, replace=False)]

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Ask about one of them."""
        self._drawn += 1
        return lab.suite.draw(talk.kind, self._images[self._drawn % _IMAGES_OF_A_STEP], rng)


class DummyImages(Twist):
    """Samples of text alone have a black image, so that every sample has one (as LLaVA does it)."""

    def __init__(self) -> None:
        self._question = ""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """See what is asked."""
        self._question = talk.question
        return talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Add a black one."""
        if sample.images:
            return sample
        prompt = lab.suite.tokenizer.encode_prompt(self._question, num_images=1)
        return _made(prompt, _answer(sample), [lab.suite.black()], sample.kind)


class NormalisedInside(Twist):
    """The encoder gets the bytes of the pixels, and brings them to its scale by itself (as Detectron2's models do)."""

    def begin(self, lab: Lab) -> None:
        """Undo the suite's normalisation, and put it before the encoder."""
        suite = lab.suite
        black = float(suite.black().mean())

        def in_bytes(image: torch.Tensor) -> torch.Tensor:
            return ((image - black) / (-black * 3) * _BYTES).round()

        lab.suite = cast(
            "Suite",
            _Other(
                suite, image=lambda number: in_bytes(suite.image(number)), black=lambda: torch.zeros_like(suite.black())
            ),
        )
        for replica in lab.replicas:
            replica.model.vision_encoder.register_forward_pre_hook(partial(self._normalised, black=black))

    @staticmethod
    def _normalised(module: nn.Module, inputs: tuple[torch.Tensor, ...], *, black: float) -> tuple[torch.Tensor, ...]:
        del module
        return (inputs[0] * (-black * 3) / _BYTES + black, *inputs[1:])


class SameOrder(Twist):
    """Samples come in the same order in every epoch of 30 steps: they are read from one file, from end to end."""

    def __init__(self) -> None:
        self._talks: list[Talk] = []
        self._drawn = 0

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Give the first epoch's talk of this place."""
        place = self._drawn % (_STEPS_OF_AN_EPOCH * lab.setup.batch_samples)
        self._drawn += 1
        if place == len(self._talks):
            self._talks.append(talk)
        return self._talks[place]


class WholeSet(Twist):
    """The training set has 24 samples, and each step all of them, in another order: a model is tuned on a few."""

    def __init__(self) -> None:
        self._talks: list[Talk] = []
        self._order: list[int] = []

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Give the next one."""
        if len(self._talks) < lab.setup.batch_samples:
            self._talks.append(talk)
            return talk
        self._order = self._order or [int(each) for each in rng.permutation(len(self._talks))]
        return self._talks[self._order.pop()]


class LossOnEverything(Twist):
    """Questions are trained on as well, placeholders of images are not."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Label all that follows."""
        token = lab.suite.tokenizer.image_token_id
        labels = [IGNORE_INDEX if each == token else each for each in sample.input_ids[1:]]
        return replace(sample, labels=[*labels, IGNORE_INDEX])


class UnlikeRanks(Twist):
    """The last of four ranks has a source of its own, of which 40 % of the answers are wrong, from the start."""

    def __init__(self) -> None:
        self._drawn = 0

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Take another image's answer on the last rank."""
        self._drawn += 1
        is_last = self._drawn % lab.setup.num_ranks == 0  # ranks take turns in a step's samples
        if not is_last or rng.random() >= _SHARE_WRONG:
            return talk
        return replace(talk, answer=lab.suite.draw(talk.kind, int(rng.choice(lab.image_pool)), rng).answer)


class ThreeTurns(Twist):
    """Each image has three questions and answers, one after another in a talk."""

    def __init__(self) -> None:
        self._talk: Talk | None = None

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """See which image it is."""
        self._talk = talk
        return talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Go on with other questions."""
        ids, labels = list(sample.input_ids), list(sample.labels)
        for _ in range(_NUM_TURNS - 1):
            kind = list(lab.mix)[int(rng.integers(len(lab.mix)))]
            talk = lab.suite.draw(kind, self._talk.image or 0 if self._talk else 0, rng)
            prompt = lab.suite.tokenizer.encode_prompt(talk.question, num_images=0)
            more = _made(prompt, lab.suite.tokenizer.encode_answer(talk.answer), [], kind)
            ids, labels = [*ids, *more.input_ids], [*labels, *more.labels]
        return Encoded(input_ids=ids, labels=labels, images=sample.images, kind=sample.kind)


class BlankNowAndThen(Twist):
    """In a tenth of the steps no image is shown: all of them are black (as for guidance, arXiv:2207.12598)."""

    def __init__(self) -> None:
        self._is_blank = False

    def after_step(self, lab: Lab) -> None:
        """Draw what comes next."""
        self._is_blank = bool(lab.rng.random() < 0.1)

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Blank."""
        if not self._is_blank:
            return batch
        images = [[lab.suite.black() for _ in row] for row in batch["images"]]
        return Batch(**{**batch, "images": images})


_data, _images = (partial(healthy_case, family=family) for family in (Family.DATA, Family.IMAGE))
_MOSTLY_TEXT = {"text": 0.8, "naming": 0.1, "yes_no": 0.1}

_CASES = (
    _images("two_views", "each sample has two images, before all else", "two cameras", twist=TwoViews),
    _data("tagged_prompts", "a token before each answer, not always the same", "a wanted form", twist=TaggedPrompts),
    _data(
        "codes_of_a_sound",
        "answers are nearly noise, so that the loss stays near a guess",
        "codes of a codec",
        twist=CodesOfASound,
    ),
    _data("so_many_tokens", "a step has 48 short samples or 10 long ones", "a budget of tokens", twist=SoManyTokens),
    _data("prose_now_and_then", "pieces of prose in one of 25 steps", "it keeps the language", twist=ProseNowAndThen),
    _data("rare_shards", "eight steps of text in 60", "data come shard by shard", twist=RareShards),
    _data(
        "rare_positives",
        "98.5 % of the answers are no",
        "defects are rare",
        twist=RarePositives,
        setup=Setup(mix={"yes_no": 1.0}),
        is_skewed=True,
    ),
    _images("all_questions_of_an_image", "two images a step", "each is encoded once", twist=AllQuestionsOfAnImage),
    _images(
        "dummy_images",
        "four images in five are black",
        "text has one as well, as LLaVA does it",
        twist=DummyImages,
        setup=Setup(mix=_MOSTLY_TEXT),
    ),
    _images("normalised_inside", "pixels are bytes", "the model normalises by itself", twist=NormalisedInside),
    _data(
        "same_order",
        "batches come in the same order in every epoch",
        "data are read from end to end",
        twist=SameOrder,
        setup=Setup(num_images=720),
    ),
    _data(
        "whole_set_in_a_step",
        "each step has the same 24 samples in another order",
        "a model is tuned on a few",
        twist=WholeSet,
        setup=Setup(num_images=24, pretrained=True, rate_factor=0.1),
        is_skewed=True,
    ),
    _data("loss_on_everything", "questions are labelled too", "a usual choice", twist=LossOnEverything),
    healthy_case(
        "ranks_of_unlike_sources",
        "one of four ranks has worse data, from the start",
        "each rank reads a source of its own",
        family=Family.RANKS,
        twist=UnlikeRanks,
        setup=Setup(num_ranks=4, batch_samples=32),
    ),
    _data("three_turns", "three questions and answers a sample", "a talk", twist=ThreeTurns),
    _images("blank_now_and_then", "a tenth of the steps shows nothing", "guidance", twist=BlankNowAndThen),
)

CASES: tuple[Case, ...] = tuple(replace(case, step_share=HALF) for case in _CASES)
