"""Healthy trainings that look alarming, held out until the second evaluation; each a twentieth of the steps."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from benchmarks.detection.case import LATE, Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.known_optimisation import cross_entropy, peak_rate
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Encoded, Talk
from torch import nn

from sidestep.examples.digits_vqa.decoder import DecoderBlock
from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch
from sidestep.examples.digits_vqa.vision import VisionBlock

_RISE_SHARE = 0.3
_CYCLE_PEAK = 2.0
_ADAGRAD_RATE_SHARE = 4.0
_LOOKAHEAD_STEPS = 5
_LOOKAHEAD_SHARE = 0.5
_MODEST_SMOOTHING = 0.1
_NOISE = 0.1
_CONTRAST = 0.15
_POOL_STAGES = ((0.0, 64), (0.2, 200), (0.4, 600), (0.6, 0))
"""Share of the run and size of the pool from there on; 0: all images."""
_SHARE_WITHOUT_IMAGE = 0.2
_ONE_IMAGE_IN = 6


class ConstantRate(Twist):
    """The peak rate at every step: neither warm-up nor end."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Return it."""
        return peak_rate(lab)


class OneCycle(Twist):
    """One cycle (Smith, arXiv:1708.07120): a long rise to twice the usual rate, and a cosine to nothing."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Follow it."""
        share = (lab.step + 1) / lab.num_steps
        if share < _RISE_SHARE:
            return peak_rate(lab) * _CYCLE_PEAK * share / _RISE_SHARE
        return peak_rate(lab) * _CYCLE_PEAK * 0.5 * (1 + math.cos(math.pi * (share - _RISE_SHARE) / (1 - _RISE_SHARE)))


class WithAdagrad(Twist):
    """Adagrad in the place of Adam: its steps become smaller by themselves."""

    def begin(self, lab: Lab) -> None:
        """Replace the optimizer; groups and their order are kept."""
        for replica in lab.replicas:
            groups = [
                {"params": list(group["params"]), "rate_share": _ADAGRAD_RATE_SHARE}
                for group in replica.optimizer.param_groups
            ]
            replica.optimizer = torch.optim.Adagrad(groups, lr=peak_rate(lab) * _ADAGRAD_RATE_SHARE)


class Lookahead(Twist):
    """Every five steps the weights go half of the way back (Zhang et al. 2019, arXiv:1907.08610)."""

    def __init__(self) -> None:
        self._slow: list[torch.Tensor] = []

    def begin(self, lab: Lab) -> None:
        """Keep the slow weights."""
        self._slow = [each.detach().clone() for each in lab.model.parameters()]

    def after_step(self, lab: Lab) -> None:
        """Move the slow weights, and go on from them."""
        if (lab.step + 1) % _LOOKAHEAD_STEPS:
            return
        with torch.no_grad():
            for slow, fast in zip(self._slow, lab.model.parameters(), strict=True):
                slow.lerp_(fast, _LOOKAHEAD_SHARE)
                fast.copy_(slow)


class LanguageModelFrozen(Twist):
    """Images are taught to a language model that is not touched (Tsimpoukelli et al. 2021, arXiv:2106.13884)."""

    def begin(self, lab: Lab) -> None:
        """Freeze."""
        for replica in lab.replicas:
            replica.model.decoder.requires_grad_(requires_grad=False)


class BranchesBeginAtZero(Twist):
    """All residual branches begin at zero (Zhang et al. 2019, arXiv:1901.09321): blocks pass on what they get."""

    def begin(self, lab: Lab) -> None:
        """Zero what ends a branch."""
        for replica in lab.replicas:
            for block in replica.model.decoder.blocks:
                nn.init.zeros_(cast("DecoderBlock", block).out_proj.weight)
                nn.init.zeros_(cast("DecoderBlock", block).down_proj.weight)
            for block in replica.model.vision_encoder.blocks:
                nn.init.zeros_(cast("VisionBlock", block).out_proj.weight)
                nn.init.zeros_(cast("VisionBlock", block).fc2.weight)


class Smoothed(Twist):
    """Label smoothing of 0.1: the loss never comes near zero."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Smooth."""
        return cross_entropy(logits, batch, _MODEST_SMOOTHING)


class SummedLoss(Twist):
    """The loss is summed over a sample's tokens: it is larger, and long answers weigh more."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Sum over tokens, mean over rows."""
        return loss * (batch["labels"] != IGNORE_INDEX).sum() / len(batch["labels"])


class Augmented(Twist):
    """Images are moved by up to a pixel, with noise and another contrast, anew each time."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Augment."""
        return replace(sample, images=[self._augmented(lab, image, rng) for image in sample.images])

    @staticmethod
    def _augmented(lab: Lab, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        black = lab.suite.black()
        light = (image - black) * float(rng.uniform(1 - _CONTRAST, 1 + _CONTRAST))
        down, right = (int(each) for each in rng.integers(-1, 2, size=2))
        noise = torch.from_numpy(rng.normal(scale=_NOISE, size=tuple(image.shape))).float()
        return torch.roll(light, (down, right), dims=(-2, -1)) + black + noise


class ImageSometimesLeftOut(Twist):
    """A fifth of the images are black on purpose, so that the model can also do without (as for guidance)."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Leave out some."""
        images = [lab.suite.black() if rng.random() < _SHARE_WITHOUT_IMAGE else image for image in sample.images]
        return replace(sample, images=images)


class TextOnTheSecondRank(Twist):
    """One rank has images and the other one nearly nothing but text: samples are grouped by what they are made of."""

    def __init__(self) -> None:
        self._drawn = 0

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Draw again where the kind does not fit the rank; ranks take turns in a step's samples."""
        number, rank = divmod(self._drawn, lab.setup.num_ranks)
        self._drawn += 1
        wants_image = rank == 0 or number % _ONE_IMAGE_IN == 0
        if wants_image == (talk.image is not None):
            return talk
        kinds = [kind for kind in lab.mix if kind != "text"] if wants_image else ["text"]
        return lab.suite.draw(kinds[int(rng.integers(len(kinds)))], int(rng.choice(lab.image_pool)), rng)


class MoreImagesInStages(Twist):
    """The training set grows in announced stages, as it is labelled."""

    def begin(self, lab: Lab) -> None:
        """Begin with a few."""
        lab.image_pool = list(range(_POOL_STAGES[0][1]))

    def after_step(self, lab: Lab) -> None:
        """Take in more where a stage begins."""
        for (_, before), (share, size) in pairwise(_POOL_STAGES):
            if lab.step + 1 == int(share * lab.num_steps):
                lab.image_pool = list(range(size or lab.suite.num_images))
                lab.announce(f"more_than_{before}_images")


class InCapitals(Twist):
    """From now on answers are written in capitals; it is announced."""

    def begin(self, lab: Lab) -> None:
        """Announce it."""
        lab.announce("capitals")

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Write it so."""
        return replace(talk, answer=talk.answer.upper())


class OneTaskPerStep(Twist):
    """Each step has samples of one task only, another one each time, so that rows are of one length."""

    def begin(self, lab: Lab) -> None:
        """Draw the first step's."""
        self._draw(lab)

    def after_step(self, lab: Lab) -> None:
        """Draw the next step's."""
        self._draw(lab)

    @staticmethod
    def _draw(lab: Lab) -> None:
        usual = lab.setup.mix or lab.suite.mix
        kinds, shares = list(usual), np.array(list(usual.values()))
        lab.mix = {kinds[int(lab.rng.choice(len(kinds), p=shares / shares.sum()))]: 1.0}


_HALF_TEXT = {"text": 0.5, "naming": 0.2, "yes_no": 0.2, "caption": 0.1}

CASES: tuple[Case, ...] = (
    healthy_case("constant_rate", "the rate is the same at every step", "the simplest schedule", twist=ConstantRate),
    healthy_case("one_cycle", "the rate rises to twice the usual one, and falls to zero", "a schedule", twist=OneCycle),
    healthy_case("adagrad", "Adagrad, whose steps become smaller", "an optimizer of choice", twist=WithAdagrad),
    healthy_case(
        "lookahead", "every five steps the weights go half-way back", "an optimizer of choice", twist=Lookahead
    ),
    healthy_case(
        "strong_weight_decay",
        "weight decay of 0.3, all weights shrink at first",
        "a strong, but usual regularisation",
        setup=Setup(weight_decay=0.3),
    ),
    healthy_case("smoothing_of_a_tenth", "label smoothing of 0.1", "a usual regularisation", twist=Smoothed),
    healthy_case(
        "summed_loss", "the loss is a sum over tokens, many times the usual", "it is reduced so", twist=SummedLoss
    ),
    healthy_case(
        "large_packed_rows",
        "eight samples a row, 48 a step, at one and a half times the rate",
        "a large batch, packed",
        family=Family.DATA,
        setup=Setup(batch_samples=48, samples_per_row=8, rate_factor=1.5),
    ),
    healthy_case(
        "tuned_on_a_few",
        "a trained model is tuned on 48 images of one task at a tenth of the rate",
        "fine-tuning: it knows them nearly from the start",
        family=Family.DATA,
        setup=Setup(pretrained=True, num_images=48, mix={"caption": 1.0}, rate_factor=0.1),
        is_skewed=True,
    ),
    healthy_case(
        "language_model_frozen",
        "a language model that has read gets no gradients, encoder and projector learn",
        "images are taught to a language model that stays what it is",
        family=Family.MODEL,
        twist=LanguageModelFrozen,
        setup=Setup(warm_start=True),
    ),
    healthy_case(
        "branches_begin_at_zero",
        "blocks do nothing at first, and most of their gradients are zero",
        "a known initialisation",
        family=Family.MODEL,
        twist=BranchesBeginAtZero,
    ),
    healthy_case(
        "augmented_images",
        "images are moved, with noise and contrast",
        "a usual augmentation",
        family=Family.IMAGE,
        twist=Augmented,
    ),
    healthy_case(
        "image_sometimes_left_out",
        "a fifth of the images are black, from the start",
        "the model shall answer without an image too",
        family=Family.IMAGE,
        twist=ImageSometimesLeftOut,
    ),
    healthy_case(
        "text_on_the_second_rank",
        "one rank has images, the other one mostly text",
        "samples are grouped by what they are made of",
        family=Family.RANKS,
        twist=TextOnTheSecondRank,
        setup=Setup(num_ranks=2, mix=_HALF_TEXT),
    ),
    healthy_case(
        "more_images_in_stages",
        "the training set grows from 64 images to all, announced",
        "data come in as they are labelled",
        family=Family.DATA,
        twist=MoreImagesInStages,
    ),
    healthy_case(
        "capitals_from_here_on",
        "answers are written in capitals from one step on, announced",
        "a planned change of style",
        family=Family.DATA,
        twist=InCapitals,
        onset_share=LATE,
    ),
    healthy_case(
        "one_task_per_step",
        "each step has one task, so that losses jump",
        "rows of one length waste nothing",
        family=Family.DATA,
        twist=OneTaskPerStep,
    ),
)
