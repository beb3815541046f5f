"""Healthy trainings that look odd, held out with `held_out_failures.py`; each is a twentieth of the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

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
_SHARE_IN_CAPITALS = 0.5
_NUM_QUESTIONS_PER_IMAGE = 4
_SHARE_UNUSUAL = 0.15
_NUM_IMAGES_SEEN = 300
_SHARE_REPLAYED = 0.3
_MUON_RATE_SHARE, _MUON_MOMENTUM, _MUON_ROUNDS = 2.0, 0.9, 5
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
_RMSPROP_RATE_SHARE = 0.3
_INVERSE_ROOT_STEPS = 60
_RATE_SHARES = (1.0, 0.1, 0.5)
_CLIPPING = 0.05
_NOISE_SHARE, _NOISE_DECAY = 0.3, 0.55
_Z_LOSS = 1e-3
_SHARE_OF_HARD_TOKENS = 0.6
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


class FourQuestionsPerImage(Twist):
    """Four samples in a row ask about the same image, as in sets that group their questions by image."""

    def __init__(self) -> None:
        self._count = 0
        self._image = 0

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Draw the talk anew for the group's image."""
        if talk.image is None:
            return talk
        if self._count % _NUM_QUESTIONS_PER_IMAGE == 0:
            self._image = talk.image
        self._count += 1
        return lab.suite.draw(talk.kind, self._image, rng)


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


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024); all else is moved by Adam."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Take groups as all optimizers do."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every weight."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                momentum = state.setdefault("exp_avg", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - _MUON_MOMENTUM)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                if weight.dim() == 2 and len(weight) <= 2 * 256:
                    step = _orthogonal(momentum) * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5 * 0.2
                    weight.sub_(step * math.sqrt(max(weight.shape)) * 0.5, alpha=group["lr"])
                    continue
                squares = state.setdefault("exp_avg_sq", torch.zeros_like(weight))
                squares.lerp_(weight.grad.square(), 0.05)
                weight.sub_(momentum / (squares.sqrt() + 1e-8), alpha=group["lr"] / _MUON_RATE_SHARE)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix whose singular values are about one, by Newton and Schulz."""
    first, second, third = _NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    found: torch.Tensor = matrix.T if is_tall else matrix
    found = found / (found.norm() + 1e-7)
    for _ in range(_MUON_ROUNDS):
        square = found @ found.T
        found = first * found + (second * square + third * square @ square) @ found
    return found.T if is_tall else found


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


class HardTokensKept(Twist):
    """The easier 40 % of the tokens are left out (Shrivastava et al. 2016, arXiv:1604.03540): the loss looks large."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Keep the hard ones."""
        labelled = batch["labels"] != IGNORE_INDEX
        each = functional.cross_entropy(logits[labelled].float(), batch["labels"][labelled], reduction="none")
        return each.topk(max(1, int(_SHARE_OF_HARD_TOKENS * len(each)))).values.mean()


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
    _data("capitals_where_asked", "half of the answers are in capitals", "as asked", twist=CapitalsWhereAsked),
    _data("question_restated", "answers begin with their question", "a style of answering", twist=QuestionRestated),
    _data(
        "four_questions_per_image",
        "each image comes four times in a row, with other questions",
        "sets group their questions by image",
        twist=FourQuestionsPerImage,
    ),
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
    healthy_case("muon", "Muon, whose updates are orthogonal", "as chosen", twist=partial(OtherOptimiser, Muon, 2.0)),
    healthy_case(
        "rmsprop",
        "RMSprop, without momentum",
        "an optimizer of choice",
        twist=partial(OtherOptimiser, torch.optim.RMSprop, _RMSPROP_RATE_SHARE),
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
    healthy_case("hard_tokens_kept", "the easy tokens are left out", "usual mining", twist=HardTokensKept),
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
