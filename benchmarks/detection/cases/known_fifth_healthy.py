"""Healthy trainings that look odd, held out until their first evaluation, the fifth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.detection.case import Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.known_data import split_answer
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.cases.known_third_optimisation import OtherOptimiser
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Encoded, Talk
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_BETAS, _EPSILON = (0.9, 0.95), 1e-8
_LAMB_RATE_SHARE = 3.0
_WARM_UP_STEPS = 50
_CYCLE_STEPS, _LOWEST, _HIGHEST = 90, 0.2, 1.2
_NUM_FIRST_SKIPS, _SKIP_INTERVAL_STEPS = 5, 160
_POLY_WEIGHT = 1.0
_LARGEST_RATIO, _LEAST_NORM = 0.05, 1e-3
_SHARE_THINNED = 0.3
_NEXT_BUT_ONE_WEIGHT = 0.3
_AVERAGED_FROM, _AVERAGED_UNTIL = 0.6, 0.85
_LAYER_DECAY = 0.65
_SHARE_LEFT_OUT = 0.2
_LEAST_SPREAD = 0.1
_SHORT_KINDS = ("yes_no", "naming", "choice")
_LONG_KINDS = ("caption", "counting", "table")


class ScheduleFree(torch.optim.Optimizer):
    """AdamW whose weights are a mean of where it has been (Defazio et al. 2024, arXiv:2405.15682), without schedule."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Take groups as all optimizers do."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "num_steps": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step the fast weights, and move the mean towards them; gradients are taken between the two."""
        del closure
        mixing, slow = _BETAS
        for group in self.param_groups:
            group["num_steps"] += 1
            group["weight_sum"] += group["lr"] ** 2
            share = group["lr"] ** 2 / group["weight_sum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(fast=weight.clone(), mean=weight.clone(), exp_avg_sq=torch.zeros_like(weight))
                state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - slow)
                size = (state["exp_avg_sq"] / (1 - slow ** group["num_steps"])).sqrt() + _EPSILON
                state["fast"].sub_(weight.grad / size + group["weight_decay"] * weight, alpha=group["lr"])
                state["mean"].lerp_(state["fast"], share)
                weight.copy_(state["fast"].lerp(state["mean"], mixing))


class Lamb(torch.optim.Optimizer):
    """Adam whose steps are as large as a share of each weight's own norm (You et al. 2019, arXiv:1904.00962)."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Take groups as all optimizers do."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": _BETAS})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Scale each weight's step by the ratio of two norms."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
                state["step"] += 1
                fast, slow = group["betas"]
                state["exp_avg"].lerp_(weight.grad, 1 - fast)
                state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - slow)
                size = (state["exp_avg_sq"] / (1 - slow ** state["step"])).sqrt() + _EPSILON
                update = state["exp_avg"] / (1 - fast ** state["step"]) / size + group["weight_decay"] * weight
                norms = float(weight.norm()), float(update.norm())
                ratio = norms[0] / norms[1] if min(norms) > 0 else 1.0
                weight.sub_(update, alpha=group["lr"] * ratio)


class WithoutSchedule(OtherOptimiser):
    """The rate stays where it is after a short warm-up; the optimizer's mean does the rest."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Return the peak."""
        return peak_rate(lab) * min(1.0, (lab.step + 1) / _WARM_UP_STEPS)


class TriangularRate(Twist):
    """The rate rises and falls in straight lines, ten times (Smith 2015, arXiv:1506.01186)."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Follow the triangles, the last of which ends low."""
        place = (lab.step % _CYCLE_STEPS) / _CYCLE_STEPS
        return peak_rate(lab) * (_LOWEST + (_HIGHEST - _LOWEST) * (1 - abs(2 * place - 1)))


class ScalerProbes(Twist):
    """A dynamic loss scale begins too high and is raised now and then: single steps overflow and are skipped."""

    def gradients(self, lab: Lab) -> None:
        """Overflow."""
        if lab.step < _NUM_FIRST_SKIPS or (lab.step + 1) % _SKIP_INTERVAL_STEPS == 0:
            lab.skips_update = True
            for replica in lab.replicas:
                for weight in replica.model.parameters():
                    if weight.grad is not None:
                        weight.grad.fill_(float("inf"))


class Poly(Twist):
    """A second term counts how far the right answer's probability is from one (Leng et al. 2022, arXiv:2204.12511)."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add it."""
        labelled = batch["labels"] != IGNORE_INDEX
        said = logits[labelled].float().softmax(dim=-1).gather(-1, batch["labels"][labelled][:, None])
        return loss + _POLY_WEIGHT * (1 - said).mean()


class ClippedByUnit(Twist):
    """Each unit's gradient is clipped to a share of its weights' norm (Brock et al. 2021, arXiv:2102.06171)."""

    def gradients(self, lab: Lab) -> None:
        """Clip the rows of all matrices but the embedding."""
        for replica in lab.replicas:
            kept = replica.model.decoder.token_embedding.weight
            for weight in replica.model.parameters():
                if weight.grad is None or weight.dim() < 2 or weight is kept:
                    continue
                rows = tuple(range(1, weight.dim()))
                most = _LARGEST_RATIO * self._norm(weight.detach(), rows).clamp(min=_LEAST_NORM)
                norm = self._norm(weight.grad, rows).clamp(min=1e-12)
                weight.grad.mul_((most / norm).clamp(max=1.0))

    @staticmethod
    def _norm(weight: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
        return weight.square().sum(dim=rows, keepdim=True).sqrt()


class LabelsThinned(Twist):
    """Of the targets 30 % are left out by chance, anew for each batch."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Leave them out."""
        is_left_out = torch.from_numpy(lab.rng.random(tuple(batch["labels"].shape)) < _SHARE_THINNED)
        return Batch(**{**batch, "labels": batch["labels"].masked_fill(is_left_out, IGNORE_INDEX)})


class TwoTokensAhead(Twist):
    """A second map foretells the token after the next one (Gloeckle et al. 2024, arXiv:2404.19737)."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None
        self._map = nn.Linear(1, 1)

    def begin(self, lab: Lab) -> None:
        """Add the map."""
        width = lab.model.decoder.token_embedding.embedding_dim
        self._map = nn.Linear(width, width, bias=False)
        lab.model.add_module("second_token_map", self._map)
        lab.replicas[0].optimizer.add_param_group({"params": list(self._map.parameters()), "lr": peak_rate(lab)})
        lab.model.decoder.norm.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del inputs
        if module.training:
            self._seen = output

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add its loss, where there are two targets in a row."""
        if self._seen is None:
            return loss
        later = batch["labels"][:, 1:]
        is_asked = (later != IGNORE_INDEX) & (batch["labels"][:, :-1] != IGNORE_INDEX)
        said = functional.linear(self._map(self._seen[:, :-1][is_asked]), lab.model.decoder.token_embedding.weight)
        return loss + _NEXT_BUT_ONE_WEIGHT * functional.cross_entropy(said.float(), later[is_asked])


class WeightsAveraged(Twist):
    """The mean of a quarter of the run's weights is taken on from there, announced (arXiv:1803.05407)."""

    def __init__(self) -> None:
        self._mean: list[torch.Tensor] = []
        self._number = 0

    def after_step(self, lab: Lab) -> None:
        """Add to the mean, and put it in once."""
        share = (lab.step + 1) / lab.num_steps
        if not _AVERAGED_FROM <= share < _AVERAGED_UNTIL:
            if self._mean:
                with torch.no_grad():
                    for learned, mean in zip(lab.model.parameters(), self._mean, strict=True):
                        learned.copy_(mean)
                self._mean = []
                lab.announce("averaged_weights")
            return
        self._number += 1
        now = [each.detach().clone() for each in lab.model.parameters()]
        self._mean = self._mean or now
        for mean, weight in zip(self._mean, now, strict=True):
            mean.lerp_(weight, 1 / self._number)


class RatesByLayer(Twist):
    """A trained model's layers learn at 0.65 of the rate of the layer above them (Clark et al. 2020, BEiT, ELECTRA)."""

    def begin(self, lab: Lab) -> None:
        """Make a group of each layer, the deepest one last."""
        for replica in lab.replicas:
            model = replica.model
            layers: list[nn.Module] = [
                model.decoder.norm,
                *reversed(model.decoder.blocks),
                model.decoder.token_embedding,
            ]
            layers += [model.MP, model.vision_encoder.layer_norm, *reversed(model.vision_encoder.blocks)]
            groups: list[dict[str, Any]] = [
                {"params": list(layer.parameters()), "rate_share": _LAYER_DECAY**depth}
                for depth, layer in enumerate(layers)
            ]
            grouped = {id(each) for group in groups for each in group["params"]}
            rest = [each for each in model.parameters() if id(each) not in grouped]
            groups.append({"params": rest, "rate_share": _LAYER_DECAY ** len(layers)})
            replica.optimizer = torch.optim.AdamW(groups, lr=peak_rate(lab), weight_decay=lab.setup.weight_decay)


class EmbeddingsFrozen(Twist):
    """The embeddings of a language model that has read stay as they are, and with them its head."""

    def begin(self, lab: Lab) -> None:
        """Freeze."""
        for replica in lab.replicas:
            replica.model.decoder.token_embedding.requires_grad_(requires_grad=False)


class ReasonsFirst(Twist):
    """An answer begins with what is seen, and ends with what was asked for (Wei et al. 2022, arXiv:2201.11903)."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Describe the image first."""
        if talk.image is None or talk.kind in {"caption", "table"}:
            return talk
        seen = lab.suite.draw("caption", talk.image, rng).answer
        return replace(talk, answer=f"{seen} So: {talk.answer}")


class ImageAfterTheQuestion(Twist):
    """The image stands behind the question, before the template's end."""

    def __init__(self) -> None:
        self._tail = 0

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Move the placeholders."""
        tokens = lab.suite.tokenizer
        if not self._tail:
            one, two = (tokens.encode_prompt(question, num_images=0) for question in ("one", "two"))
            while one[-self._tail - 1 :] == two[-self._tail - 1 :]:
                self._tail += 1
        prompt, answer = split_answer(sample)
        text = [token for token in prompt if token != tokens.image_token_id]
        images = [tokens.image_token_id] * (len(prompt) - len(text))
        ids = [*text[: -self._tail], *images, *text[-self._tail :], *answer]
        return replace(sample, input_ids=ids)


class LongAnswersOnTheSecondRank(Twist):
    """Samples are grouped by length: one rank has short answers, the other one long ones."""

    def __init__(self) -> None:
        self._drawn = 0

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:
        """Draw again where the kind does not fit the rank; ranks take turns in a step's samples."""
        wanted = (_SHORT_KINDS, _LONG_KINDS)[self._drawn % lab.setup.num_ranks]
        self._drawn += 1
        if talk.kind in wanted or talk.image is None:
            return talk
        return lab.suite.draw(wanted[int(rng.integers(len(wanted)))], talk.image, rng)


class PatchesLeftOut(Twist):
    """In training a fifth of all patches is left out (FLIP, Li et al. 2022, arXiv:2212.00794)."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def begin(self, lab: Lab) -> None:
        """Put it behind the patches' embedding."""
        self._generator.manual_seed(int(lab.rng.integers(2**31)))
        for replica in lab.replicas:
            replica.model.vision_encoder.patch_embedding.register_forward_hook(self._thinned)

    def _thinned(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del inputs
        if not module.training:
            return output
        is_kept = torch.rand((len(output), 1, *output.shape[2:]), generator=self._generator) >= _SHARE_LEFT_OUT
        return output * is_kept / (1 - _SHARE_LEFT_OUT)


class EachImageByItself(Twist):
    """Each image is normalised by its own mean and spread, as for X-rays and other scans without a common scale."""

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Normalise."""
        images = [(image - image.mean()) / image.std().clamp(min=_LEAST_SPREAD) for image in sample.images]
        return replace(sample, images=images)


_data, _model, _image, _ranks = (
    partial(healthy_case, family=family) for family in (Family.DATA, Family.MODEL, Family.IMAGE, Family.RANKS)
)

CASES: tuple[Case, ...] = (
    healthy_case("radam", "RAdam", "an optimizer of choice", twist=partial(OtherOptimiser, torch.optim.RAdam)),
    healthy_case(
        "schedule_free",
        "the rate stays at its peak, weights are a mean",
        "an optimizer of choice",
        twist=partial(WithoutSchedule, ScheduleFree),
    ),
    healthy_case(
        "lamb",
        "steps as large as a share of each weight",
        "an optimizer of choice",
        twist=partial(OtherOptimiser, Lamb, _LAMB_RATE_SHARE),
    ),
    healthy_case("triangular_rate", "the rate rises and falls ten times", "a known schedule", twist=TriangularRate),
    healthy_case(
        "scaler_probes",
        "single steps overflow and are skipped, the first five above all",
        "usual half precision",
        twist=ScalerProbes,
    ),
    healthy_case(
        "large_batch_without_decay",
        "64 samples a step at 1.6 times the rate, no weight decay",
        "a usual setting",
        setup=Setup(batch_samples=64, rate_factor=1.6, weight_decay=0.0),
    ),
    healthy_case("poly_loss", "the loss has a second term", "a usual loss", twist=Poly),
    healthy_case(
        "clipped_by_unit",
        "gradients are clipped row by row",
        "as of NFNets",
        twist=ClippedByUnit,
        setup=Setup(max_gradient_norm=0.0),
    ),
    healthy_case("two_tokens_ahead", "two tokens are foretold at once", "a usual second loss", twist=TwoTokensAhead),
    healthy_case("weights_averaged", "weights become their mean, announced", "a usual end", twist=WeightsAveraged),
    healthy_case(
        "rates_by_layer",
        "the deepest layer learns at 4 % of the rate",
        "the usual fine-tuning",
        twist=RatesByLayer,
        setup=Setup(pretrained=True),
    ),
    _model(
        "embeddings_frozen",
        "embeddings and head have no gradients",
        "a language model that has read keeps its words",
        twist=EmbeddingsFrozen,
        setup=Setup(warm_start=True),
    ),
    _data("labels_thinned", "30 % of the targets are left out", "a usual regularisation", twist=LabelsThinned),
    _data("reasons_first", "answers describe before they answer", "as asked", twist=ReasonsFirst),
    _data(
        "letters_and_captions",
        "six answers in ten are a letter, mostly A, the others a sentence",
        "the options are listed so",
        setup=Setup(mix={"skewed_choice": 0.6, "caption": 0.4}),
        is_skewed=True,
    ),
    _image("image_after_the_question", "images come late", "a usual template", twist=ImageAfterTheQuestion),
    _image("patches_left_out", "a fifth of the patches is left out", "a usual regularisation", twist=PatchesLeftOut),
    _image("each_image_by_itself", "each image has its own scale", "a usual normalisation", twist=EachImageByItself),
    _ranks("eight_ranks", "eight ranks of four samples", "usual", setup=Setup(num_ranks=8, batch_samples=32)),
    _ranks(
        "long_answers_on_the_second_rank",
        "one rank has short answers, the other one long ones",
        "samples are grouped by length",
        twist=LongAnswersOnTheSecondRank,
        setup=Setup(num_ranks=2),
    ),
)
