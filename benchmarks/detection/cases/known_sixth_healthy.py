"""Healthy trainings that look odd, held out until their first evaluation, the sixth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from benchmarks.detection.case import Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases import known_sixth_healthy_data
from benchmarks.detection.cases.known_model import decoder_blocks
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.cases.known_third_optimisation import OtherOptimiser
from benchmarks.detection.lab import Lab
from benchmarks.detection.replicas import make_model, make_optimizer
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_BETAS, _EPSILON = (0.9, 0.95), 1e-8
_ADAN_BETAS = (0.98, 0.92, 0.99)
_NADAM_RATE_SHARE = 0.5
_WARM_UP_SHARE = 0.03
_WARM_UP_STEPS = 30
_PATIENCE_STEPS, _LEAST_GAIN, _PLATEAU_FACTOR, _LEAST_SHARE, _SMOOTHING = 50, 0.01, 0.5, 0.02, 0.05
_MATRIX_DECAY = 0.1
_TEMPERATURE, _TEACHER_SHARE = 2.0, 0.5
_PROMPT_WEIGHT = 0.1
_CONTRAST_WEIGHT, _CONTRAST_TEMPERATURE = 0.1, 0.1
_SHARE_OF_HARD_TOKENS = 0.6
_PROJECTOR_WIDTH = 192


class Adan(torch.optim.Optimizer):
    """Adam with Nesterov's momentum, estimated from gradients' differences (Xie et al. 2022, arXiv:2208.06677)."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Take groups as all optimizers do."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": _ADAN_BETAS})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step by three moving means."""
        del closure
        for group in self.param_groups:
            first, second, third = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(step=0, before=weight.grad.clone())
                    state.update({name: torch.zeros_like(weight) for name in ("mean", "difference", "square")})
                state["step"] += 1
                change = weight.grad - state["before"]
                state["before"].copy_(weight.grad)
                state["mean"].lerp_(weight.grad, 1 - first)
                state["difference"].lerp_(change, 1 - second)
                state["square"].lerp_((weight.grad + second * change).square(), 1 - third)
                mean, difference, square = (
                    state[name] / (1 - beta ** state["step"])
                    for name, beta in (("mean", first), ("difference", second), ("square", third))
                )
                weight.sub_((mean + second * difference) / (square.sqrt() + _EPSILON), alpha=group["lr"])
                weight.div_(1 + group["lr"] * group["weight_decay"])


class CautiousAdamW(torch.optim.Optimizer):
    """AdamW that leaves out what the gradient disagrees with (Liang et al. 2024, arXiv:2411.16085)."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Take groups as all optimizers do."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": _BETAS})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step where momentum and gradient have one sign, by as much more."""
        del closure
        for group in self.param_groups:
            fast, slow = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
                state["step"] += 1
                state["exp_avg"].lerp_(weight.grad, 1 - fast)
                state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - slow)
                size = (state["exp_avg_sq"] / (1 - slow ** state["step"])).sqrt() + _EPSILON
                update = state["exp_avg"] / (1 - fast ** state["step"]) / size
                agrees = (update * weight.grad > 0).to(update.dtype)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update * agrees / agrees.mean().clamp(min=1e-3), alpha=group["lr"])


class LinearToZero(Twist):
    """A short warm-up, and a straight line to zero from there on: the default of many trainers."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Follow it."""
        share = (lab.step + 1) / lab.num_steps
        return peak_rate(lab) * min(share / _WARM_UP_SHARE, max(0.0, 1 - share) / (1 - _WARM_UP_SHARE))


class RateOnPlateaus(Twist):
    """The rate is halved where the smoothed loss has not become better for 50 steps."""

    def __init__(self) -> None:
        self._smoothed, self._best, self._best_step, self._share = math.nan, math.inf, 0, 1.0

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Follow the loss."""
        now = float(loss.detach())
        self._smoothed = now if math.isnan(self._smoothed) else self._smoothed + _SMOOTHING * (now - self._smoothed)
        return loss

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Halve it in time."""
        if self._smoothed < self._best * (1 - _LEAST_GAIN):
            self._best, self._best_step = self._smoothed, lab.step
        elif lab.step - self._best_step >= _PATIENCE_STEPS:
            self._share, self._best_step = max(_LEAST_SHARE, self._share * _PLATEAU_FACTOR), lab.step
        return peak_rate(lab) * self._share * min(1.0, (lab.step + 1) / _WARM_UP_STEPS)


class MatricesAloneDecay(Twist):
    """Matrices have a weight decay of 0.1, norms and biases none: two groups over all modules."""

    def begin(self, lab: Lab) -> None:
        """Group by the number of dimensions."""
        for replica in lab.replicas:
            weights = list(replica.model.parameters())
            groups = [
                {"params": [each for each in weights if each.dim() > 1], "weight_decay": _MATRIX_DECAY},
                {"params": [each for each in weights if each.dim() <= 1], "weight_decay": 0.0},
            ]
            replica.optimizer = torch.optim.AdamW(groups, lr=peak_rate(lab), betas=_BETAS)


class DistilledFromATeacher(Twist):
    """A new model learns from the labels and from a trained one's probabilities (Hinton et al., arXiv:1503.02531)."""

    def __init__(self) -> None:
        self._teacher = nn.Module()

    def begin(self, lab: Lab) -> None:
        """Keep the trained model as the teacher, and begin anew."""
        self._teacher = copy.deepcopy(lab.model).eval().requires_grad_(requires_grad=False)
        with torch.random.fork_rng():
            torch.manual_seed(int(lab.rng.integers(2**31)))
            fresh = make_model(lab.suite).state_dict()
        for replica in lab.replicas:
            replica.model.load_state_dict(fresh)

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Mix both losses."""
        labelled = batch["labels"] != IGNORE_INDEX
        with torch.no_grad():
            taught, _ = self._teacher(
                batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
            )
        said, wanted = (
            functional.log_softmax(each[labelled].float() / _TEMPERATURE, dim=-1) for each in (logits, taught)
        )
        apart = functional.kl_div(said, wanted, reduction="batchmean", log_target=True) * _TEMPERATURE**2
        return (1 - _TEACHER_SHARE) * loss + _TEACHER_SHARE * apart


class SquareAveraged(Twist):
    """A sample weighs as the root of its targets (InternVL 2.5, Chen et al. 2024, arXiv:2412.05271)."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Weigh each target by one over the root of its row's number of them."""
        labels = batch["labels"]
        labelled = labels != IGNORE_INDEX
        each = functional.cross_entropy(logits[labelled].float(), labels[labelled], reduction="none")
        weights = labelled.sum(dim=1, keepdim=True).clamp(min=1).rsqrt().expand_as(labels)[labelled]
        return (weights * each).sum() / weights.sum()


class PromptsCountALittle(Twist):
    """The words of the prompts are foretold too, at a tenth of the weight (arXiv:2401.13586)."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add their loss."""
        following, is_real = batch["input_ids"][:, 1:], batch["attention_mask"] != 0
        is_prompt = (batch["labels"][:, :-1] == IGNORE_INDEX) & is_real[:, 1:] & is_real[:, :-1]
        is_prompt &= following != lab.suite.tokenizer.image_token_id
        said = logits[:, :-1][is_prompt].float()
        return loss + _PROMPT_WEIGHT * functional.cross_entropy(said, following[is_prompt])


class ImageTextContrast(Twist):
    """Images are drawn to the words of their own answers, away from others' (CoCa, arXiv:2205.01917)."""

    def __init__(self) -> None:
        self._pictures: torch.Tensor | None = None

    def begin(self, lab: Lab) -> None:
        """Look at what the projector gives."""
        lab.model.MP.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        del inputs
        if module.training:
            self._pictures = output

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add the contrast of both directions."""
        labels = batch["labels"]
        if self._pictures is None or len(self._pictures) != len(labels):
            return loss
        labelled = (labels != IGNORE_INDEX)[..., None]
        words = lab.model.decoder.token_embedding(labels.clamp(min=0)) * labelled
        texts = functional.normalize(words.sum(dim=1) / labelled.sum(dim=1).clamp(min=1), dim=-1)
        alike = functional.normalize(self._pictures.mean(dim=1), dim=-1) @ texts.T / _CONTRAST_TEMPERATURE
        own = torch.arange(len(alike))
        both = functional.cross_entropy(alike, own) + functional.cross_entropy(alike.T, own)
        return loss + _CONTRAST_WEIGHT * both / 2


class HardestTokensAlone(Twist):
    """Only the six tenths of all targets that are known least count (Shrivastava et al. 2016, arXiv:1604.03540)."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Keep them."""
        labelled = batch["labels"] != IGNORE_INDEX
        each = functional.cross_entropy(logits[labelled].float(), batch["labels"][labelled], reduction="none")
        return each.topk(max(1, int(_SHARE_OF_HARD_TOKENS * len(each)))).values.mean()


class NormsAndBiasesAlone(Twist):
    """Of a trained model only norms and biases are adapted (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199)."""

    def begin(self, lab: Lab) -> None:
        """Freeze all that has more than one dimension."""
        for replica in lab.replicas:
            for weight in replica.model.parameters():
                weight.requires_grad = weight.dim() == 1


class LastLayersAlone(Twist):
    """Of a trained model the last block of the language model, its norm and the projector learn on."""

    def begin(self, lab: Lab) -> None:
        """Freeze the rest, and step what is left."""
        for replica in lab.replicas:
            model = replica.model
            model.requires_grad_(requires_grad=False)
            for part in (model.MP, model.decoder.blocks[-1], model.decoder.norm):
                part.requires_grad_(requires_grad=True)
            learned = [each for each in model.parameters() if each.requires_grad]
            replica.optimizer = torch.optim.AdamW(learned, lr=peak_rate(lab), weight_decay=lab.setup.weight_decay)


class ProjectorOfTwoLayers(Twist):
    """The projector is a perceptron of two layers, as of LLaVA 1.5 (arXiv:2310.03744)."""

    def begin(self, lab: Lab) -> None:
        """Put it in the place of the linear map."""
        with torch.random.fork_rng():
            torch.manual_seed(int(lab.rng.integers(2**31)))
            width = lab.model.decoder.token_embedding.embedding_dim
            first = nn.Linear(lab.model.MP.proj.in_features, _PROJECTOR_WIDTH)
            layers = nn.Sequential(first, nn.GELU(), nn.Linear(_PROJECTOR_WIDTH, width))
        for replica in lab.replicas:
            replica.model.MP.add_module("proj", copy.deepcopy(layers))
            replica.optimizer = make_optimizer(replica.model, lab.setup, peak_rate(lab))


class QueriesAndKeysNormed(Twist):
    """Queries and keys of the language model are normed, with gains that are learned (arXiv:2302.05442)."""

    def begin(self, lab: Lab) -> None:
        """Norm what the attention's first map gives."""
        head_width = int(lab.model.decoder.cosine.shape[-1])
        for block in decoder_blocks(lab):
            norms = nn.ModuleList(nn.RMSNorm(head_width) for _ in range(2))
            block.add_module("query_key_norms", norms)
            block.qkv_proj.register_forward_hook(partial(self._normed, norms, head_width))
        for replica in lab.replicas:
            replica.optimizer = make_optimizer(replica.model, lab.setup, peak_rate(lab))

    @staticmethod
    def _normed(
        norms: nn.ModuleList,
        head_width: int,
        module: nn.Module,
        inputs: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> torch.Tensor:
        del module, inputs
        query, key, value = output.chunk(3, dim=-1)
        heads = (*query.shape[:-1], -1, head_width)
        query, key = (norm(each.reshape(heads)).flatten(-2) for norm, each in zip(norms, (query, key), strict=True))
        return torch.cat((query, key, value), dim=-1)


_model = partial(healthy_case, family=Family.MODEL)
_nadam = partial(torch.optim.NAdam, betas=_BETAS, decoupled_weight_decay=True)

CASES: tuple[Case, ...] = (
    healthy_case("nadam", "NAdam", "an optimizer of choice", twist=partial(OtherOptimiser, _nadam, _NADAM_RATE_SHARE)),
    healthy_case(
        "adan", "Adan, with three moving means", "an optimizer of choice", twist=partial(OtherOptimiser, Adan)
    ),
    healthy_case(
        "cautious_steps",
        "weights step only where momentum and gradient agree",
        "an optimizer of choice",
        twist=partial(OtherOptimiser, CautiousAdamW),
    ),
    healthy_case("linear_to_zero", "the rate falls in a line to zero", "a usual schedule", twist=LinearToZero),
    healthy_case(
        "rate_on_plateaus", "the rate is halved at once, now and then", "a usual schedule", twist=RateOnPlateaus
    ),
    healthy_case(
        "matrices_alone_decay",
        "two groups, one with a weight decay of 0.1, one with none",
        "the usual grouping",
        twist=MatricesAloneDecay,
    ),
    healthy_case(
        "distilled_from_a_teacher",
        "half of the loss is the distance to another model",
        "a usual loss",
        twist=DistilledFromATeacher,
        setup=Setup(pretrained=True),
    ),
    healthy_case("square_averaged", "short answers weigh less", "a usual reduction", twist=SquareAveraged),
    healthy_case(
        "prompts_count_a_little", "prompts are learned too, a little", "a known setting", twist=PromptsCountALittle
    ),
    healthy_case("image_text_contrast", "the loss has a second term", "a usual second loss", twist=ImageTextContrast),
    healthy_case(
        "hardest_tokens_alone",
        "40 % of the targets do not count, the ones that are known best",
        "a known way to choose",
        twist=HardestTokensAlone,
    ),
    _model(
        "norms_and_biases_alone",
        "matrices have no gradients",
        "a usual fine-tuning",
        twist=NormsAndBiasesAlone,
        setup=Setup(pretrained=True, mix={"yes_no": 0.5, "counting": 0.5}),
    ),
    _model(
        "last_layers_alone",
        "the encoder and the first block have no gradients",
        "a usual fine-tuning",
        twist=LastLayersAlone,
        setup=Setup(pretrained=True, rate_factor=0.5),
    ),
    _model("projector_of_two_layers", "a deeper projector", "as of LLaVA 1.5", twist=ProjectorOfTwoLayers),
    _model("queries_and_keys_normed", "attention is normed", "a usual stabiliser", twist=QueriesAndKeysNormed),
    *known_sixth_healthy_data.CASES,
)
