"""Healthy trainings that provoke the detectors, written by somebody who has read them: optimizers, rates and weights.

Each aims at a rule that was right on all healthy runs before it; `what` says what is odd, `legitimate` why it is sane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmarks.detection.case import Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.cases.known_third_optimisation import OtherOptimiser
from benchmarks.detection.lab import Lab
from torch import nn

from sidestep.examples.digits_vqa.packing import Batch

HALF = 0.5
"""Of the usual steps: what is odd here shows early."""
_PRODIGY_BETAS, _PRODIGY_DECAY, _FIRST_DISTANCE = (0.9, 0.999), 0.01, 1e-6
_RMSPROP_RATE_SHARE, _RMSPROP_DECAY = 0.02, 1e-5
_MUON_MOMENTUM, _MUON_DECAY, _MUON_SCALE = 0.95, 0.1, 0.2
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NUM_NEWTON_SCHULZ = 5
_LAST_DECAY = 0.1
_LAST_RATE = 1e-3
_SHARPNESS_RADIUS = 0.05
_BLOCKS_TURN_STEPS = 10
_OUTER_STEPS, _OUTER_RATE, _OUTER_MOMENTUM = 30, 0.7, 0.6
_LAST_BITS = 16

_TWO_TASKS = {"caption": 0.5, "table": 0.5}


class Prodigy(torch.optim.Optimizer):
    """Adam that finds its rate by itself (Mishchenko and Defazio 2023, arXiv:2306.06101); its `lr` is 1.

    As its authors' package has it: the groups count the updates in `k`, and a parameter's `step` stays 0.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Take groups as all optimizers do."""
        del weight_decay  # the usual one of this method
        super().__init__(
            groups,
            {
                "lr": lr, "betas": _PRODIGY_BETAS, "eps": 1e-8, "weight_decay": _PRODIGY_DECAY, "d": _FIRST_DISTANCE,
                "k": 0,
            },
        )  # fmt: skip
        self._numerator = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """See how far the weights have gone, and step."""
        del closure
        distance, rate = self.param_groups[0]["d"], self.param_groups[0]["lr"]
        beta1, beta2 = _PRODIGY_BETAS
        slow = math.sqrt(beta2)
        self._numerator *= slow
        denominator = 0.0
        for weight in self._stepped():
            state = self.state[weight]
            if not state:
                state["step"] = 0
                state["p0"] = weight.detach().clone()
                state["s"], state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight) for _ in range(3))
            grad, scale = weight.grad, distance / _FIRST_DISTANCE * distance * rate
            self._numerator += scale * float((grad * (state["p0"] - weight)).sum())
            state["exp_avg"].mul_(beta1).add_(grad, alpha=distance * (1 - beta1))
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=distance**2 * (1 - beta2))
            state["s"].mul_(slow).add_(grad, alpha=scale)
            denominator += float(state["s"].abs().sum())
        if denominator > 0 and rate > 0:
            distance = max(distance, self._numerator / denominator)
        for weight in self._stepped():
            state = self.state[weight]
            weight.mul_(1 - distance * rate * _PRODIGY_DECAY)
            weight.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(distance * 1e-8), value=-distance * rate)
        for group in self.param_groups:
            group["d"], group["k"] = distance, group["k"] + 1

    def _stepped(self) -> list[torch.Tensor]:
        return [each for group in self.param_groups for each in group["params"] if each.grad is not None]


def rmsprop(groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return RMSprop as EfficientNet is trained (Tan and Le 2019, arXiv:1905.11946): eps 0.001, momentum 0.9."""
    del weight_decay
    return torch.optim.RMSprop(groups, lr=lr, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=_RMSPROP_DECAY)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Jordan 2024; scaled as in arXiv:2502.16982), Adam for everything else."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Split the groups: matrices have a momentum, the others betas."""
        split: list[dict[str, Any]] = []
        for group in groups:
            matrices = [each for each in group["params"] if each.dim() == 2]
            others = [each for each in group["params"] if each.dim() != 2]
            share = {"rate_share": group.get("rate_share", 1.0)}
            split.append({"params": matrices, "momentum": _MUON_MOMENTUM, "weight_decay": _MUON_DECAY, **share})
            split.append({"params": others, "betas": (0.9, 0.95), "eps": 1e-10, **share})
        super().__init__([each for each in split if each["params"]], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each group in its own way."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    step = self._orthogonal if "momentum" in group else self._adam
                    update = step(weight, weight.grad, group)
                    weight.sub_(update, alpha=group["lr"])

    def _orthogonal(self, weight: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        momentum: torch.Tensor = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"])
        is_tall = update.shape[0] > update.shape[1]
        matrix = update.T if is_tall else update
        matrix = matrix / (matrix.norm() + 1e-7)
        first, third, fifth = _NEWTON_SCHULZ
        for _ in range(_NUM_NEWTON_SCHULZ):
            square = matrix @ matrix.T
            matrix = first * matrix + (third * square + fifth * square @ square) @ matrix
        scaled: torch.Tensor = (matrix.T if is_tall else matrix) * _MUON_SCALE * math.sqrt(max(update.shape))
        return scaled

    def _adam(self, weight: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        first: torch.Tensor = state.setdefault("exp_avg", torch.zeros_like(weight))
        second: torch.Tensor = state.setdefault("exp_avg_sq", torch.zeros_like(weight))
        step = int(state.get("step", 0)) + 1
        state["step"] = step
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        size = (second / (1 - beta2**step)).sqrt() + float(group["eps"])
        moved: torch.Tensor = first / (1 - beta1**step) / size
        return moved


class StochasticallyRounded(torch.optim.AdamW):
    """AdamW for weights in bfloat16, rounded up or down by chance (Zamirai et al. 2020, arXiv:2010.06192).

    The weights are kept in float32 with the last bits empty, so that they are those of bfloat16 to the bit.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Begin with rounded weights."""
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self._generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        self._round()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step, and round."""
        super().step(closure)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                bits = weight.view(torch.int32)
                bits += torch.randint(0, 1 << _LAST_BITS, bits.shape, dtype=torch.int32, generator=self._generator)
                bits &= -(1 << _LAST_BITS)


class DecayByEpoch(Twist):
    """Weight decay rises from 0.01 to 0.1 on a cosine, once an epoch (as of DINO, arXiv:2104.14294)."""

    def __init__(self) -> None:
        self._epoch = 0

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """See which epoch it is."""
        if batch["epoch"] != self._epoch:
            self._epoch = batch["epoch"]
            num_epochs = lab.num_steps * lab.setup.batch_samples / len(lab.image_pool)
            share = min(1.0, self._epoch / num_epochs)
            first = lab.setup.weight_decay
            decay = _LAST_DECAY - (_LAST_DECAY - first) * 0.5 * (1 + math.cos(math.pi * share))
            for replica in lab.replicas:
                for group in replica.optimizer.param_groups:
                    group["weight_decay"] = decay
        return batch


class ExponentialDecay(Twist):
    """The rate falls by the same part at every step, to a thousandth (`ExponentialLR`)."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Follow it after the usual warm-up."""
        share = math.exp(math.log(_LAST_RATE) * lab.step / lab.num_steps)
        return min(rate, peak_rate(lab) * share)


class FourthPower(Twist):
    """The rate falls with the fourth power of what is left of the run."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Follow it after the usual warm-up."""
        return min(rate, peak_rate(lab) * (1 - lab.step / lab.num_steps) ** 4)


class SharpnessAware(Twist):
    """The gradient is that of weights a little uphill (SAM, Foret et al. 2020, arXiv:2010.01412)."""

    def __init__(self) -> None:
        self._batch: Batch | None = None

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Keep the batch."""
        self._batch = batch
        return loss

    def gradients(self, lab: Lab) -> None:
        """Go uphill, take the gradient there, and come back."""
        batch = self._batch
        if batch is None:
            raise ValueError("no forward has been there")
        learned = [each for each in lab.model.parameters() if each.grad is not None]
        norm = torch.stack([each.grad.norm() for each in learned if each.grad is not None]).norm() + 1e-12
        with torch.no_grad():
            uphill = [_SHARPNESS_RADIUS * each.grad / norm for each in learned if each.grad is not None]
            for weight, step in zip(learned, uphill, strict=True):
                weight.add_(step)
        lab.model.zero_grad(set_to_none=True)
        _, loss = lab.model(
            batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
        )
        if loss is not None:
            loss.backward()
        with torch.no_grad():
            for weight, step in zip(learned, uphill, strict=True):
                weight.sub_(step)


class LayersInTurn(Twist):
    """One block of the language model learns at a time, drawn anew every ten steps (LISA, arXiv:2403.17919)."""

    def begin(self, lab: Lab) -> None:
        """Draw the first."""
        self._draw(lab)

    def after_step(self, lab: Lab) -> None:
        """Draw the next."""
        if (lab.step + 1) % _BLOCKS_TURN_STEPS == 0:
            self._draw(lab)

    @staticmethod
    def _draw(lab: Lab) -> None:
        for replica in lab.replicas:
            blocks = replica.model.decoder.blocks
            chosen = int(lab.rng.integers(len(blocks)))
            for place, block in enumerate(blocks):
                block.requires_grad_(requires_grad=place == chosen)


class OuterMomentum(Twist):
    """Every 30 steps an outer optimizer with Nesterov's momentum steps from where the inner one has come to.

    DiLoCo (Douillard et al. 2023, arXiv:2311.08105) on one worker, where it helps as well.
    """

    def __init__(self) -> None:
        self._slow: list[torch.Tensor] = []
        self._momentum: list[torch.Tensor] = []

    def begin(self, lab: Lab) -> None:
        """Keep the slow weights."""
        self._slow = [each.detach().clone() for each in lab.model.parameters()]
        self._momentum = [torch.zeros_like(each) for each in self._slow]

    def after_step(self, lab: Lab) -> None:
        """Step outside."""
        if (lab.step + 1) % _OUTER_STEPS:
            return
        with torch.no_grad():
            for slow, momentum, fast in zip(self._slow, self._momentum, lab.model.parameters(), strict=True):
                step = slow - fast
                momentum.mul_(_OUTER_MOMENTUM).add_(step)
                slow.sub_(step + _OUTER_MOMENTUM * momentum, alpha=_OUTER_RATE)
                fast.copy_(slow)


class ProjectorAlone(Twist):
    """A new projector between an encoder and a language model that are kept (LLaVA's first stage, arXiv:2304.08485)."""

    def begin(self, lab: Lab) -> None:
        """Freeze, and begin the projector anew."""
        for replica in lab.replicas:
            replica.model.requires_grad_(requires_grad=False)
            replica.model.MP.requires_grad_(requires_grad=True)
            drawn = torch.from_numpy(lab.rng.normal(scale=0.02, size=tuple(replica.model.MP.proj.weight.shape)))
            with torch.no_grad():
                replica.model.MP.proj.weight.copy_(drawn)


class UntiedHead(Twist):
    """The head has weights of its own, and its rate is twice that of the rest."""

    def begin(self, lab: Lab) -> None:
        """Untie it."""
        for replica in lab.replicas:
            decoder = replica.model.decoder
            decoder.head.weight = nn.Parameter(decoder.token_embedding.weight.detach().clone())
            replica.optimizer.add_param_group(
                {"params": [decoder.head.weight], "lr": peak_rate(lab), "rate_share": 2.0, "weight_decay": 0.0}
            )


class RateZeroAtFirst(Twist):
    """The encoder's rate is 0 for a fifth of the run, as its group has a warm-up of its own that begins later."""

    def after_step(self, lab: Lab) -> None:
        """Let it learn from then on."""
        self._set(lab, 1.0 if lab.step + 1 >= lab.num_steps // 5 else 0.0)

    def begin(self, lab: Lab) -> None:
        """Hold it still."""
        self._set(lab, 0.0)

    @staticmethod
    def _set(lab: Lab, share: float) -> None:
        for replica in lab.replicas:
            replica.optimizer.param_groups[1]["rate_share"] = share


def _prodigy() -> Twist:
    return OtherOptimiser(Prodigy, 1.0 / 3e-3)  # the suites' rate: its own `lr` is 1


_CASES = (
    healthy_case(
        "prodigy",
        "a rate of 1, which is none yet, with a weight decay of 0.01",
        "as its authors advise",
        twist=_prodigy,
    ),
    healthy_case(
        "rmsprop_with_a_large_eps",
        "RMSprop with an eps of 0.001 and a weight decay of 0.00001",
        "EfficientNet's settings",
        twist=partial(OtherOptimiser, rmsprop, _RMSPROP_RATE_SHARE),
    ),
    healthy_case(
        "muon",
        "orthogonalised updates, and Adam for the rest",
        "an optimizer of choice",
        twist=partial(OtherOptimiser, Muon),
    ),
    healthy_case(
        "stochastic_rounding",
        "weights in bfloat16 of which nearly all stand still at a step, at a small rate",
        "updates are rounded by chance, so that none is lost",
        twist=partial(OtherOptimiser, StochasticallyRounded),
        setup=Setup(pretrained=True, mix=_TWO_TASKS, rate_factor=0.006),
    ),
    healthy_case(
        "decay_by_epoch",
        "weight decay changes once in 40 steps",
        "a schedule by epochs",
        twist=DecayByEpoch,
        setup=Setup(num_images=960),
    ),
    healthy_case("exponential_decay", "the rate falls to a thousandth", "a classic schedule", twist=ExponentialDecay),
    healthy_case(
        "rate_by_the_fourth_power", "most of the rate is gone half-way", "a polynomial schedule", twist=FourthPower
    ),
    healthy_case("sharpness_aware", "two forwards and backwards a step", "SAM", twist=SharpnessAware),
    healthy_case(
        "layers_in_turn",
        "blocks are frozen and released every ten steps, as the method has it",
        "LISA",
        family=Family.MODEL,
        twist=LayersInTurn,
        setup=Setup(pretrained=True, mix=_TWO_TASKS),
    ),
    healthy_case("outer_momentum", "weights are moved from outside every 30 steps", "DiLoCo", twist=OuterMomentum),
    healthy_case(
        "projector_alone",
        "a new projector is all that learns",
        "the first stage of LLaVA",
        family=Family.MODEL,
        twist=ProjectorAlone,
        setup=Setup(pretrained=True, rate_factor=4.0),
    ),
    healthy_case("untied_head", "the head is not the embedding", "usual", family=Family.MODEL, twist=UntiedHead),
    healthy_case(
        "encoder_begins_later",
        "the encoder's rate is 0 for a fifth of the run",
        "groups have schedules of their own",
        twist=RateZeroAtFirst,
    ),
    healthy_case(
        "one_sample_a_step",
        "each step has a single sample",
        "all that fits the memory",
        setup=Setup(batch_samples=1, rate_factor=0.2),
    ),
    healthy_case(
        "micro_batches_of_one",
        "twelve micro-batches of one sample",
        "a small machine",
        setup=Setup(batch_samples=12, accumulation_steps=12, rate_factor=0.7),
    ),
)

CASES: tuple[Case, ...] = tuple(replace(case, step_share=HALF) for case in _CASES)
