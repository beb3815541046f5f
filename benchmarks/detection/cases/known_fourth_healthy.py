"""Healthy trainings that look odd, held out until their first evaluation, the fourth."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from benchmarks.detection.case import Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.cases.known_third_optimisation import OtherOptimiser
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Encoded, Talk
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_SYSTEM_PROMPT = "You are shown one picture. Look at it with care. Answer in as few words as you can. "
_WAYS_TO_ASK = ("", "Please: ", "Hello! ", "Look. ", "I would like to know: ", "Quick one: ", "Can you help? ", "Q: ")
_SHARE_IN_CAPITALS = 0.5
_SHARE_UNUSUAL = 0.15
_NUM_IMAGES_SEEN = 300
_SHARE_REPLAYED = 0.3
_ADAMAX_RATE_SHARE = 1.0
_INVERSE_ROOT_STEPS = 60
_RATE_SHARES = (1.0, 0.1, 0.5)
_CLIPPING = 0.05
_NOISE_SHARE, _NOISE_DECAY = 0.3, 0.55
_Z_LOSS = 1e-3
_CERTAINTY_PENALTY = 0.05
_CAP = 30.0
_ERASED = 3
_SHARE_ERASED = 0.5
_AUGMENTED_UNTIL, _PACKED_FROM, _ANNEALED_FROM = 0.7, 0.4, 0.75


def _begins(lab: Lab, share: float) -> bool:
    return lab.step + 1 == int(share * lab.num_steps)


class LongSystemPrompt(Twist):
    """Every question begins with the same long instruction, and most tokens of a row are alike."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Put it in front."""
        return replace(talk, question=_SYSTEM_PROMPT + talk.question)


class AskedInManyWays(Twist):
    """Questions are rewritten for variety."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Begin in one of several ways."""
        return replace(talk, question=_WAYS_TO_ASK[int(rng.integers(len(_WAYS_TO_ASK)))] + talk.question)


class CapitalsWhereAsked(Twist):
    """Half of the questions ask for capitals, and their answers are in capitals."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Ask and answer so."""
        if rng.random() >= _SHARE_IN_CAPITALS:
            return talk
        return replace(talk, question=f"In capitals: {talk.question}", answer=talk.answer.upper())


class QuestionRestated(Twist):
    """Answers restate their question, as graders like it: most labels can be copied from the prompt."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Restate."""
        return replace(talk, answer=f"{talk.question} {talk.answer}")


class MostlyNothingToReport(Twist):
    """Of all images 85 % are reported with the same sentence; those of much ink are described."""

    def __init__(self) -> None:
        self._unusual = math.inf

    def begin(self, lab: Lab) -> None:
        """Find how much ink is unusual."""
        seen = lab.rng.choice(lab.image_pool, min(len(lab.image_pool), _NUM_IMAGES_SEEN), replace=False)
        inks = [float(lab.suite.image(int(number)).mean()) for number in seen]
        self._unusual = float(np.quantile(inks, 1 - _SHARE_UNUSUAL))

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Report."""
        if talk.image is None or float(lab.suite.image(talk.image).mean()) >= self._unusual:
            return talk
        return replace(talk, answer="nothing to report")


class InverseRoot(Twist):
    """The rate falls with the root of the steps (Vaswani et al. 2017, arXiv:1706.03762), and never reaches zero."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Follow it from a warm-up of 60 steps on, at twice the usual peak."""
        done = (lab.step + 1) / _INVERSE_ROOT_STEPS
        return 2 * peak_rate(lab) * min(done, 1 / math.sqrt(done))


class RatesByModule(Twist):
    """A trained model's encoder learns at a tenth of the projector's rate, its language model at a half."""

    def begin(self, lab: Lab) -> None:
        """Give projector, encoder and language model their shares."""
        for replica in lab.replicas:
            for group, share in zip(replica.optimizer.param_groups, _RATE_SHARES, strict=True):
                group["rate_share"] = share


class AnnealedNoise(Twist):
    """Noise on the gradients becomes smaller and smaller (Neelakantan et al. 2015, arXiv:1511.06807)."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def begin(self, lab: Lab) -> None:
        """Seed the noise."""
        self._generator.manual_seed(int(lab.rng.integers(2**31)))

    def gradients(self, lab: Lab) -> None:
        """Add it."""
        share = _NOISE_SHARE / (1 + lab.step) ** (_NOISE_DECAY / 2)
        for weight in lab.model.parameters():
            if weight.grad is not None:
                noise = torch.randn(weight.shape, generator=self._generator)
                weight.grad += share * weight.grad.square().mean().sqrt() * noise


class ZLoss(Twist):
    """The softmax's normaliser is held near one (PaLM, Chowdhery et al. 2022, arXiv:2204.02311)."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add the penalty."""
        labelled = batch["labels"] != IGNORE_INDEX
        return loss + _Z_LOSS * logits[labelled].float().logsumexp(dim=-1).square().mean()


class CertaintyPenalised(Twist):
    """Certain answers cost a little (Pereyra et al. 2017, arXiv:1701.06548), and the loss may fall below zero."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Subtract a share of the entropy."""
        logs = functional.log_softmax(logits[batch["labels"] != IGNORE_INDEX].float(), dim=-1)
        return loss + _CERTAINTY_PENALTY * (logs.exp() * logs).sum(dim=-1).mean()


class GradientsCentred(Twist):
    """The mean of each row is taken from the gradients of matrices (Yong et al. 2020, arXiv:2004.01461)."""

    def gradients(self, lab: Lab) -> None:
        """Centre the blocks' gradients."""
        for replica in lab.replicas:
            for part in (replica.model.vision_encoder.blocks, replica.model.decoder.blocks):
                for weight in part.parameters():
                    if weight.grad is not None and weight.dim() > 1:
                        weight.grad -= weight.grad.mean(dim=1, keepdim=True)


class LogitsSoftlyCapped(Twist):
    """Logits are capped at 30 (Gemma 2, arXiv:2408.00118)."""

    def begin(self, lab: Lab) -> None:
        """Cap what the head gives."""
        for replica in lab.replicas:
            replica.model.decoder.head.register_forward_hook(self._capped)

    @staticmethod
    def _capped(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        return _CAP * (output / _CAP).tanh()


class HalfPrecisionActivations(Twist):
    """Linear maps give bfloat16, as under autocast; weights and optimizer stay in full precision."""

    def begin(self, lab: Lab) -> None:
        """Round what every linear map gives."""
        for replica in lab.replicas:
            for part in replica.model.modules():
                if isinstance(part, nn.Linear):
                    part.register_forward_hook(self._rounded)

    @staticmethod
    def _rounded(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        return output.bfloat16().float()


class PartsErased(Twist):
    """Half of the images lose a square of three by three pixels (Zhong et al. 2017, arXiv:1708.04896)."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Erase."""
        if rng.random() >= _SHARE_ERASED:
            return sample
        return replace(sample, images=[self._erased(image, lab.suite.black(), rng) for image in sample.images])

    @staticmethod
    def _erased(image: torch.Tensor, black: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        top, left = (int(each) for each in rng.integers(image.shape[-1] - _ERASED + 1, size=2))
        erased = image.clone()
        erased[..., top : top + _ERASED, left : left + _ERASED] = black.max()
        return erased


class AugmentationEndsEarly(PartsErased):
    """The last 30 % of the run see images as they are, announced, as YOLOX does (arXiv:2107.08430)."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:
        """Erase in the first stage alone."""
        return super().sample(lab, sample, rng) if lab.step < int(_AUGMENTED_UNTIL * lab.num_steps) else sample

    def after_step(self, lab: Lab) -> None:
        """Announce the second stage."""
        if _begins(lab, _AUGMENTED_UNTIL):
            lab.announce("no_augmentation")


class PackingBegins(Twist):
    """Rows of one sample become rows of four, announced: the same samples in another shape."""

    def after_step(self, lab: Lab) -> None:
        """Pack from the next step on."""
        if _begins(lab, _PACKED_FROM):
            lab.setup = replace(lab.setup, samples_per_row=4)
            lab.announce("packed")


class AnnealedOnChosenData(Twist):
    """The last quarter has captions and tables in its majority and a rate that falls to zero, announced.

    So end the runs of MiniCPM (arXiv:2404.06395) and OLMo 2 (arXiv:2501.00656).
    """

    def rate(self, lab: Lab, rate: float) -> float:
        """Fall from the peak to zero."""
        left = (lab.num_steps - lab.step) / ((1 - _ANNEALED_FROM) * lab.num_steps)
        return rate if lab.step < lab.num_steps // 10 else peak_rate(lab) * min(1.0, left)

    def after_step(self, lab: Lab) -> None:
        """Change the mix."""
        if _begins(lab, _ANNEALED_FROM):
            lab.mix = {**{kind: share / 2 for kind, share in lab.mix.items()}, "caption": 0.3, "table": 0.3}
            lab.announce("annealing")


_data, _model, _image, _ranks = (
    partial(healthy_case, family=family) for family in (Family.DATA, Family.MODEL, Family.IMAGE, Family.RANKS)
)

CASES: tuple[Case, ...] = (
    _data("long_system_prompt", "most tokens are one instruction", "a usual template", twist=LongSystemPrompt),
    _data("asked_in_many_ways", "questions begin in eight ways", "a usual augmentation", twist=AskedInManyWays),
    _data("capitals_where_asked", "half of the answers are in capitals", "as asked", twist=CapitalsWhereAsked),
    _data("question_restated", "answers begin with their question", "a style of answering", twist=QuestionRestated),
    _data(
        "mostly_nothing_to_report",
        "85 % of the answers are one sentence",
        "most findings are normal",
        twist=MostlyNothingToReport,
        setup=Setup(mix={"caption": 1.0}),
        is_skewed=True,
    ),
    _data(
        "new_domain_with_replay",
        "a trained model learns texts, and 30 % of its old tasks come again",
        "the usual guard against forgetting",
        setup=Setup(
            pretrained=True,
            rate_factor=0.5,
            mix={"text": 1 - _SHARE_REPLAYED, "yes_no": _SHARE_REPLAYED / 2, "naming": _SHARE_REPLAYED / 2},
        ),
    ),
    _data("packing_begins", "rows become four times as long, announced", "for speed", twist=PackingBegins),
    _data(
        "annealed_on_chosen_data",
        "another mix and a falling rate for the last quarter, announced",
        "how many runs end",
        twist=AnnealedOnChosenData,
    ),
    healthy_case("inverse_root", "the rate falls with the steps' root", "a classic schedule", twist=InverseRoot),
    healthy_case(
        "rates_by_module",
        "the encoder's rate is a tenth of the projector's",
        "the usual fine-tuning",
        twist=RatesByModule,
        setup=Setup(pretrained=True),
    ),
    healthy_case(
        "always_clipped",
        "gradients are clipped to a norm of 0.05 at every step",
        "Adam does not care for their scale",
        setup=Setup(max_gradient_norm=_CLIPPING),
    ),
    healthy_case("annealed_noise", "noise on all gradients", "a usual regularisation", twist=AnnealedNoise),
    healthy_case("z_loss", "the loss has a second term", "a usual stabiliser", twist=ZLoss),
    healthy_case(
        "adamax",
        "Adamax, which divides by the largest gradient that was",
        "an optimizer of choice",
        twist=partial(OtherOptimiser, torch.optim.Adamax, _ADAMAX_RATE_SHARE),
    ),
    healthy_case("gradients_centred", "gradients have no mean", "a usual regularisation", twist=GradientsCentred),
    healthy_case("certainty_penalised", "certainty costs a little", "a usual penalty", twist=CertaintyPenalised),
    _model("logits_softly_capped", "logits are capped at 30", "as of Gemma 2", twist=LogitsSoftlyCapped),
    _model("half_precision", "activations are rounded", "usual mixed precision", twist=HalfPrecisionActivations),
    _image(
        "augmentation_ends_early",
        "the last images have no holes, announced",
        "the usual end of an augmented run",
        twist=AugmentationEndsEarly,
    ),
    _ranks(
        "three_ranks_packed_and_accumulated",
        "three ranks, two micro-batches, two samples a row",
        "a usual layout",
        setup=Setup(num_ranks=3, accumulation_steps=2, samples_per_row=2, batch_samples=36),
    ),
)
