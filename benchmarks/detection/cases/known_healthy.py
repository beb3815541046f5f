"""Healthy trainings that look alarming, held out until their first evaluation, and known since.

Written with `known_failures.py`, by somebody who had not read the detectors. All run equally long, so each is a
twentieth of the healthy steps.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from benchmarks.detection.case import LATE, Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.known_model import Dropout
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Talk

_WARM_UP_SHARE = 0.3
_NUM_RESTARTS = 3
_MODEST_DROPOUT = 0.2
_SHARE_WRONG = 0.1
_SHARE_REPEATED = 0.2
_NUM_REMEMBERED = 200
_SHARE_OF_NO_KEPT = 0.375
_FADE_SHARE = 0.25
_SHARE_OF_NEW_TASK = 0.4
_UNFREEZING_SHARES = (0.25, 0.4, 0.55)
_SGD_RATE_SHARE = 15.0
_SGD_MOMENTUM = 0.9


class CosineToZero(Twist):
    """A cosine that ends at zero: the last updates are none, and the loss is flat."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Follow it after the usual warm-up."""
        return min(rate, peak_rate(lab) * 0.5 * (1 + math.cos(math.pi * (lab.step + 1) / lab.num_steps)))


class LongWarmUp(Twist):
    """The rate grows over 30 % of the run, and nothing happens for long."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Hold the rate below the ramp."""
        return min(rate, peak_rate(lab) * (lab.step + 1) / (_WARM_UP_SHARE * lab.num_steps))


class WarmRestarts(Twist):
    """Three cosines, one after another (Loshchilov and Hutter, arXiv:1608.03983): the loss rises at each restart."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Follow them after the usual warm-up."""
        share = (lab.step * _NUM_RESTARTS / lab.num_steps) % 1.0
        cosine = peak_rate(lab) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        return min(rate, cosine) if lab.step < lab.num_steps // 10 else cosine


class WithMomentum(Twist):
    """SGD with momentum in the place of Adam."""

    def begin(self, lab: Lab) -> None:
        """Replace the optimizer; groups and their order are kept."""
        for replica in lab.replicas:
            groups = [
                {"params": list(group["params"]), "rate_share": _SGD_RATE_SHARE}
                for group in replica.optimizer.param_groups
            ]
            replica.optimizer = torch.optim.SGD(groups, lr=peak_rate(lab) * _SGD_RATE_SHARE, momentum=_SGD_MOMENTUM)


class FrozenEncoder(Twist):
    """The vision encoder is frozen from the start, as where a pretrained one is kept."""

    def begin(self, lab: Lab) -> None:
        """Freeze."""
        for replica in lab.replicas:
            replica.model.vision_encoder.requires_grad_(requires_grad=False)


class UnfrozenInStages(Twist):
    """The projector learns first; the language model's blocks, and at last the vision encoder, are released later.

    Gradual unfreezing (Howard and Ruder, arXiv:1801.06146), and the order in which LLaVA-like models are trained.
    """

    def begin(self, lab: Lab) -> None:
        """Freeze all but projector, embedding and norms."""
        for replica in lab.replicas:
            replica.model.vision_encoder.requires_grad_(requires_grad=False)
            replica.model.decoder.blocks.requires_grad_(requires_grad=False)

    def after_step(self, lab: Lab) -> None:
        """Release one part at each stage, the next step is its first."""
        released = [int(share * lab.num_steps) for share in _UNFREEZING_SHARES]
        if lab.step + 1 not in released:
            return
        stage = released.index(lab.step + 1)
        for replica in lab.replicas:
            parts = (replica.model.decoder.blocks[-1], replica.model.decoder.blocks, replica.model.vision_encoder)
            parts[stage].requires_grad_(requires_grad=True)
        lab.announce(f"unfreezing_{stage + 1}")


class OneLabelInTenWrong(Twist):
    """A tenth of the answers belong to other images, all along (Northcutt et al. 2021, arXiv:2103.14749)."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Take the whole talk's answer from a draw about another image."""
        if rng.random() >= _SHARE_WRONG:
            return talk
        other = lab.suite.draw(talk.kind, int(rng.choice(lab.image_pool)), rng)
        return Talk(kind=talk.kind, question=talk.question, answer=other.answer, image=talk.image)


class RowsRepeated(Twist):
    """A fifth of the samples have been seen within the last 200: a web crawl, or a small set that is weighed up."""

    def __init__(self) -> None:
        self._seen: list[Talk] = []

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Repeat one or remember this one."""
        if self._seen and rng.random() < _SHARE_REPEATED:
            return self._seen[int(rng.integers(len(self._seen)))]
        self._seen = [*self._seen[-_NUM_REMEMBERED + 1 :], talk]
        return talk


class MostlyYes(Twist):
    """85 % of the answers are "yes", as in VQA sets before they were balanced (Goyal et al. 2017, arXiv:1612.00837)."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Ask again, about the same image, most times when the answer is "no"."""
        if talk.image is None or talk.answer != "no" or rng.random() < _SHARE_OF_NO_KEPT:
            return talk
        while talk.answer == "no":
            talk = lab.suite.draw(talk.kind, int(talk.image or 0), rng)
        return talk


class NewTaskFadesIn(Twist):
    """A new task takes up to 40 % of the samples, over a quarter of the run; its start is announced."""

    def begin(self, lab: Lab) -> None:
        """Announce it."""
        lab.announce("tables_fade_in")

    def after_step(self, lab: Lab) -> None:
        """Set the next step's mix."""
        progress = min(1.0, (lab.step + 1 - lab.onset) / (_FADE_SHARE * lab.num_steps))
        share = _SHARE_OF_NEW_TASK * progress
        lab.mix = {**{kind: part * (1 - share) for kind, part in lab.setup.mix.items()}, "table": share}


class GrowingAnswers(Twist):
    """Answers grow in three announced stages: mostly short ones, then lists, then sentences and tables.

    No task is ever absent, so the samples that are generated from make sense throughout.
    """

    _STAGES: tuple[dict[str, float], ...] = (
        {"yes_no": 0.4, "naming": 0.4, "counting": 0.1, "caption": 0.05, "table": 0.05},
        {"yes_no": 0.2, "naming": 0.2, "counting": 0.4, "caption": 0.1, "table": 0.1},
        {"yes_no": 0.05, "naming": 0.05, "counting": 0.2, "caption": 0.4, "table": 0.3},
    )

    def begin(self, lab: Lab) -> None:
        """Begin with short ones."""
        lab.mix = dict(self._STAGES[0])

    def after_step(self, lab: Lab) -> None:
        """Go on to the next stage at each third of the run."""
        starts = [place * lab.num_steps // len(self._STAGES) for place in range(len(self._STAGES))]
        if lab.step + 1 in starts[1:]:
            stage = starts.index(lab.step + 1)
            lab.mix = dict(self._STAGES[stage])
            lab.announce(f"longer_answers_{stage}")


_FIVE_TASKS = {"yes_no": 0.2, "naming": 0.2, "counting": 0.2, "caption": 0.2, "table": 0.2}
_WITHOUT_TABLES = {"yes_no": 0.3, "naming": 0.3, "counting": 0.2, "caption": 0.2}
_LONG_TAIL = {"choice": 0.45, "yes_no": 0.3, "naming": 0.15, "caption": 0.05, "table": 0.05}
_WITH_TEXT = {"text": 0.4, "naming": 0.2, "yes_no": 0.2, "caption": 0.2}

CASES: tuple[Case, ...] = (
    healthy_case("cosine_to_zero", "the rate falls to zero", "the usual schedule of many papers", twist=CosineToZero),
    healthy_case("long_warm_up", "the rate grows for 30 % of the run", "a cautious schedule", twist=LongWarmUp),
    healthy_case(
        "warm_restarts", "the rate jumps back to its peak twice", "a schedule with restarts", twist=WarmRestarts
    ),
    healthy_case(
        "four_samples_a_step",
        "losses and gradients are very noisy",
        "all that fits the memory",
        setup=Setup(batch_samples=4, rate_factor=0.5),
    ),
    healthy_case(
        "large_batch_in_eight_parts",
        "72 samples a step, by accumulation of 8",
        "a large batch on a small machine",
        setup=Setup(batch_samples=72, accumulation_steps=8),
    ),
    healthy_case(
        "sgd_with_momentum", "SGD with momentum, which learns late", "an optimizer of choice", twist=WithMomentum
    ),
    healthy_case(
        "never_clipped",
        "gradients are not clipped, at one and a half times the rate",
        "many trainings clip nothing",
        setup=Setup(max_gradient_norm=0.0, rate_factor=1.5),
    ),
    healthy_case(
        "encoder_frozen_throughout",
        "the vision encoder has no gradients, under a language model that has read",
        "projector and language model are all that is adapted",
        family=Family.MODEL,
        twist=FrozenEncoder,
        setup=Setup(warm_start=True),
    ),
    healthy_case(
        "unfrozen_in_stages",
        "modules begin to learn one after another, announced",
        "gradual unfreezing",
        family=Family.MODEL,
        twist=UnfrozenInStages,
        setup=Setup(warm_start=True),
    ),
    healthy_case(
        "dropout_of_a_fifth",
        "dropout of 0.2 in the language model",
        "a usual regularisation",
        family=Family.MODEL,
        twist=partial(Dropout, _MODEST_DROPOUT),
    ),
    healthy_case(
        "one_label_in_ten_wrong",
        "a tenth of the labels are wrong, from the start",
        "data of the usual quality",
        family=Family.DATA,
        twist=OneLabelInTenWrong,
    ),
    healthy_case(
        "mostly_yes",
        "85 % of the answers are yes, and the rest is hard",
        "the questions are asked so",
        family=Family.DATA,
        twist=MostlyYes,
        setup=Setup(mix={"yes_no": 1.0}),
        is_skewed=True,
    ),
    healthy_case(
        "numbers_only",
        "nothing but counting",
        "a specialist",
        family=Family.DATA,
        setup=Setup(mix={"counting": 1.0}),
        is_skewed=True,
    ),
    healthy_case(
        "memorised_until_zero",
        "32 images with one answer each, until the loss is near zero",
        "a test of whether the model can overfit",
        family=Family.DATA,
        setup=Setup(num_images=32, mix={"naming": 0.5, "caption": 0.5}),
        is_skewed=True,
    ),
    healthy_case(
        "text_and_images",
        "40 % of the samples have no image",
        "text keeps the language model what it is",
        family=Family.IMAGE,
        setup=Setup(mix=_WITH_TEXT),
    ),
    healthy_case(
        "long_tail_of_lengths",
        "most answers have one token, some have thirty; three are packed into a row",
        "answers are as long as they are",
        family=Family.DATA,
        setup=Setup(mix=_LONG_TAIL, samples_per_row=3),
    ),
    healthy_case(
        "a_fifth_repeated",
        "20 % of the samples are exact repetitions",
        "a small set that is weighed up",
        family=Family.DATA,
        twist=RowsRepeated,
        is_skewed=True,
    ),
    healthy_case(
        "new_task_fades_in",
        "tables come in, from none to 40 %, announced where it begins",
        "a planned change of the mix",
        family=Family.DATA,
        twist=NewTaskFadesIn,
        setup=Setup(mix=_WITHOUT_TABLES),
        onset_share=LATE,
    ),
    healthy_case(
        "growing_answers",
        "answers become longer in three announced stages",
        "a curriculum",
        family=Family.DATA,
        twist=GrowingAnswers,
        setup=Setup(mix=_FIVE_TASKS),
    ),
    healthy_case(
        "two_small_ranks",
        "two ranks of four samples each, which differ much in every step",
        "small shards are noisy",
        family=Family.RANKS,
        setup=Setup(num_ranks=2, batch_samples=8, rate_factor=0.5),
    ),
)
