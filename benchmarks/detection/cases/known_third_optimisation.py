"""Held-out failures of the optimisation: its settings, which tokens count, and what becomes of gradients on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist, failure_case
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.lab import Lab
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_OPTIMISER = frozenset({Blame.OPTIMISER})
_RATE = frozenset({Blame.RATE, Blame.OPTIMISER})
_LOSS = frozenset({Blame.LABELS, Blame.OPTIMISER})
_EPSILON, _WEIGHT_DECAY = 0.1, 1e-8
_WARM_UP_RUNS = 5
_LION_BETAS = (0.9, 0.99)
_NUM_TALKS_COUNTED = 600
_SHARE_KEPT = 0.5
_SHARE_SENT = 0.01


class Lion(torch.optim.Optimizer):
    """The sign of a momentum (Chen et al. 2023, arXiv:2302.06675)."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        """Take groups as all optimizers do."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every weight by the whole rate."""
        del closure
        fast, slow = _LION_BETAS
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(momentum.lerp(weight.grad, 1 - fast).sign_(), alpha=group["lr"])
                momentum.lerp_(weight.grad, 1 - slow)


class OtherOptimiser(Twist):
    """Another optimizer in the place of AdamW, at a share of its rate; Lion's authors advise a third to a tenth.

    lucidrains/denoising-diffusion-pytorch#170: "when I directly replace adamw with lion, the performance degrades".
    """

    def __init__(self, make: Callable[..., torch.optim.Optimizer], rate_share: float = 1.0) -> None:
        """Call `make` with groups, `lr` and `weight_decay`."""
        self._make = make
        self._rate_share = rate_share

    def begin(self, lab: Lab) -> None:
        """Replace the optimizer; groups and their order are kept."""
        for replica in lab.replicas:
            groups = [
                {"params": list(group["params"]), "rate_share": self._rate_share}
                for group in replica.optimizer.param_groups
            ]
            rate = peak_rate(lab) * self._rate_share
            replica.optimizer = self._make(groups, lr=rate, weight_decay=lab.setup.weight_decay)


class EpsilonAndDecaySwapped(Twist):
    """Adam's epsilon and its weight decay stand in each other's place in a list of arguments.

    chainer/chainer#7137 is about their order; okoge-kaz/llm-recipes#8, mlpnlp/mlpnlp-nmt#4 about such an epsilon.
    """

    def begin(self, lab: Lab) -> None:
        """Swap them."""
        for replica in lab.replicas:
            for group in replica.optimizer.param_groups:
                group["eps"], group["weight_decay"] = _EPSILON, _WEIGHT_DECAY


class WarmUpLongerThanTheRun(Twist):
    """A warm-up in steps that was meant for a longer run: a fifth of it is done when training ends.

    facebookresearch/d2go#19, PeterGriffinJin/Search-R1#28.
    """

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Return the ramp."""
        return peak_rate(lab) * (lab.step + 1) / (_WARM_UP_RUNS * lab.num_steps)


class WeightedByFrequency(Twist):
    """Tokens weigh in the loss as they are frequent, where the inverse is meant.

    jfzhang95/pytorch-deeplab-xception#109 has both in one question.
    """

    def __init__(self) -> None:
        self._weights = torch.empty(0)

    def begin(self, lab: Lab) -> None:
        """Count the answers' tokens."""
        counts: Counter[int] = Counter()
        for kind, share in lab.mix.items():
            for image in lab.rng.choice(lab.image_pool, max(1, int(share * _NUM_TALKS_COUNTED))):
                counts.update(lab.suite.tokenizer.encode_answer(lab.suite.draw(kind, int(image), lab.rng).answer))
        self._weights = torch.ones(len(lab.suite.tokenizer))
        for token, count in counts.items():
            self._weights[token] += count

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Weigh."""
        targets = batch["labels"].flatten()
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets, weight=self._weights, ignore_index=IGNORE_INDEX
        )


class EasyTokensKept(Twist):
    """Of each batch the half with the smallest loss is kept, where mining keeps the largest: `topk` the wrong way.

    Shrivastava et al. 2016, arXiv:1604.03540, the other way round.
    """

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Keep the easy half."""
        labelled = batch["labels"] != IGNORE_INDEX
        each = functional.cross_entropy(logits[labelled].float(), batch["labels"][labelled], reduction="none")
        return each.topk(max(1, int(_SHARE_KEPT * len(each))), largest=False).values.mean()


class OwnShardOfTheVocabulary(Twist):
    """With the head split in two, each half's softmax is taken over that half alone: nobody reduces the sums.

    NVIDIA/Megatron-LM#7452 and bigscience-workshop/Megatron-DeepSpeed#394 are about such losses.
    """

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Leave out the logits of the half that the label is not in."""
        labelled = batch["labels"] != IGNORE_INDEX
        targets, chosen = batch["labels"][labelled], logits[labelled].float()
        half = chosen.shape[-1] // 2
        is_upper = torch.arange(chosen.shape[-1]) >= half
        foreign = is_upper != (targets >= half)[:, None]
        return functional.cross_entropy(chosen.masked_fill(foreign, float("-inf")), targets)


class RestForgotten(Twist):
    """Ranks send a hundredth of each gradient, the largest entries, and forget the rest instead of keeping it.

    pytorch/pytorch#48670 and #49418 add the feedback that is missing here; Lin et al. 2017, arXiv:1712.01887.
    """

    def gradients(self, lab: Lab) -> None:
        """Zero all but the largest entries."""
        for replica in lab.replicas:
            for parameter in replica.model.parameters():
                if parameter.grad is not None:
                    size = parameter.grad.abs().flatten()
                    least = size.topk(max(1, int(_SHARE_SENT * len(size)))).values[-1]
                    parameter.grad.masked_fill_(parameter.grad.abs() < least, 0.0)


class ShardsNotGathered(Twist):
    """Each rank steps its own half of the weights, and nobody gathers the other half.

    Sharded optimizers (Rajbhandari et al. 2019, arXiv:1910.02054; deepspeedai/DeepSpeed#156 on that very gather).
    """

    def gradients(self, lab: Lab) -> None:
        """Drop the gradients of what other ranks step."""
        for replica in lab.replicas:
            for place, parameter in enumerate(replica.model.parameters()):
                if place % lab.setup.num_ranks != replica.rank:
                    parameter.grad = None


_failure = partial(failure_case, Family.OPTIMISATION)

CASES: tuple[Case, ...] = (
    _failure(
        "epsilon_and_decay_swapped",
        "Adam's epsilon is 0.1, from the start",
        EpsilonAndDecaySwapped,
        _RATE,
        onset_share=None,
    ),
    _failure(
        "warm_up_longer_than_the_run",
        "the rate never comes near its peak",
        WarmUpLongerThanTheRun,
        _RATE,
        onset_share=None,
    ),
    _failure(
        "lion_at_the_rate_of_adam",
        "Lion runs at AdamW's rate, from the start",
        partial(OtherOptimiser, Lion),
        _RATE,
        onset_share=None,
    ),
    _failure(
        "weighted_by_frequency",
        "frequent tokens weigh more, rare ones less, from the start",
        WeightedByFrequency,
        _LOSS,
        onset_share=None,
    ),
    _failure("easy_tokens_kept", "the harder half of the tokens is left out of the loss", EasyTokensKept, _LOSS),
    _failure(
        "softmax_over_half_the_vocabulary",
        "the loss compares a token with its own half of the vocabulary, from the start",
        OwnShardOfTheVocabulary,
        _LOSS | {Blame.MODULE},
        onset_share=None,
    ),
    _failure(
        "compressed_without_feedback",
        "of each gradient one entry in a hundred is used, the rest is lost",
        RestForgotten,
        _OPTIMISER | {Blame.RANKS},
        setup=Setup(num_ranks=2),
    ),
    Case(
        name="shards_not_gathered",
        family=Family.RANKS,
        what="each of two ranks steps one half of the weights, and never gets the other",
        is_failure=True,
        twist=ShardsNotGathered,
        setup=Setup(num_ranks=2),
        onset_share=LATE,
        blame=frozenset({Blame.RANKS, Blame.WEIGHTS, Blame.OPTIMISER}),
        harm=Harm.INVARIANT,
        invariant="all ranks hold the same weights",
        is_exact=True,
    ),
)
