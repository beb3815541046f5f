"""Healthy trainings that provoke the detectors: what is trained on is not the cross-entropy alone."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmarks.detection.case import Case, Family, Setup, Twist, healthy_case
from benchmarks.detection.cases.known_model import Dropout, decoder_blocks
from benchmarks.detection.cases.known_optimisation import cross_entropy, peak_rate
from benchmarks.detection.cases.provoking_optimisers import HALF
from benchmarks.detection.lab import Lab
from benchmarks.detection.warm_start import pretrain
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_HEAD_INTERVAL_STEPS, _HEAD_WEIGHT = 6, 0.1
_CYCLE_STEPS, _MOST_WEIGHT = 100, 0.3
_FLOOD = 0.15
_SHARE_OF_LAYERS_LEFT_OUT = 0.1
_NUM_TALKS_COUNTED = 600
_HEAVIEST = 10.0
_STRONG_SMOOTHING = 0.2
_TWIN_DROPOUT = 0.1
_TEMPERATURE = 2.0
_TEACHER_SEED = 11
_ENTROPY_WEIGHT = 0.1


def _rows(batch: Batch, chosen: torch.Tensor) -> Batch:
    """Return some of a batch's rows."""
    return Batch(
        input_ids=batch["input_ids"][chosen],
        labels=batch["labels"][chosen],
        attention_mask=batch["attention_mask"][chosen],
        images=[batch["images"][int(row)] for row in chosen],
        epoch=batch["epoch"],
    )


class HeadNowAndThen(Twist):
    """A head for a second task, which has samples in one of six steps: how bright the image is."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None
        self._head = nn.Linear(1, 1)

    def begin(self, lab: Lab) -> None:
        """Add it."""
        width = lab.model.decoder.width
        self._head = nn.Linear(width, 1)
        lab.model.add_module("brightness_head", self._head)
        lab.replicas[0].optimizer.add_param_group({"params": list(self._head.parameters()), "lr": peak_rate(lab)})
        lab.model.decoder.norm.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del module, inputs
        self._seen = output

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add the second task's, where it is its turn."""
        if lab.step % _HEAD_INTERVAL_STEPS or self._seen is None or not all(batch["images"]):
            return loss
        wanted = torch.stack([row[0].mean() for row in batch["images"]])
        return loss + _HEAD_WEIGHT * functional.mse_loss(self._head(self._seen[:, -2]).squeeze(-1), wanted)


class WeightInCycles(Twist):
    """A term on the image embeddings whose weight rises and begins anew, four times (Fu et al., arXiv:1903.10145)."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None

    def begin(self, lab: Lab) -> None:
        """See what the projector gives."""
        lab.model.MP.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del module, inputs
        self._seen = output

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add it: over half of a cycle it grows, then it stays."""
        if self._seen is None:
            return loss
        weight = _MOST_WEIGHT * min(1.0, 2 * (lab.step % _CYCLE_STEPS) / _CYCLE_STEPS)
        return loss + weight * self._seen.square().mean()


class Flooded(Twist):
    """The loss is kept at a level of 0.15 by turning round below it (Ishida et al. 2020, arXiv:2002.08709)."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Flood."""
        return (loss - _FLOOD).abs() + _FLOOD


class LayerDrop(Twist):
    """In training each block is left out with a chance of 0.1, for the whole batch (Fan et al., arXiv:1909.11556).

    Drawn from a generator of its own, which all ranks share.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def begin(self, lab: Lab) -> None:
        """Put it behind the blocks of the language model."""
        self._generator.manual_seed(int(lab.rng.integers(2**31)))
        for block in decoder_blocks(lab):
            block.register_forward_hook(self._left_out)

    def _left_out(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        if module.training and float(torch.rand((), generator=self._generator)) < _SHARE_OF_LAYERS_LEFT_OUT:
            return (inputs[0], *output[1:])
        return output


class WeighedAgainstFrequency(Twist):
    """Rare answers weigh more, by the inverse of how frequent they are (Cui et al. 2019, arXiv:1901.05555)."""

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
            self._weights[token] = min(_HEAVIEST, counts.total() / len(counts) / count)

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Weigh."""
        targets = batch["labels"].flatten()
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets, weight=self._weights, ignore_index=IGNORE_INDEX
        )


class StronglySmoothed(Twist):
    """Label smoothing of 0.2."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Smooth."""
        return cross_entropy(logits, batch, _STRONG_SMOOTHING)


class HardestRows(Twist):
    """Of twice as many samples those with the larger loss are trained on (Jiang et al. 2019, arXiv:1910.00762)."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:
        """Choose them by the model as it is."""
        with torch.no_grad():
            logits, _ = lab.replicas[rank].model(
                batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
            )
            each = functional.cross_entropy(
                logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
            ).view(batch["labels"].shape)
        mean = each.sum(dim=1) / (batch["labels"] != IGNORE_INDEX).sum(dim=1)
        return _rows(batch, mean.topk(len(mean) // 2).indices.sort().values)


class Twice(Dropout):
    """Each sample stands twice in its batch, under another dropout, and both shall say the same (R-Drop)."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Repeat the batch."""
        return _rows(batch, torch.arange(len(batch["labels"])).repeat(2))

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add how far they are apart."""
        said = logits[batch["labels"] != IGNORE_INDEX].float().log_softmax(dim=-1)
        first, second = said.chunk(2)
        apart = functional.kl_div(first, second, log_target=True, reduction="batchmean")
        return loss + 0.5 * (apart + functional.kl_div(second, first, log_target=True, reduction="batchmean"))


class Distilled(Twist):
    """Half of the loss is the cross-entropy, half a trained teacher's say at a temperature of 2 (arXiv:1503.02531)."""

    def __init__(self) -> None:
        self._teacher: nn.Module | None = None

    def begin(self, lab: Lab) -> None:
        """Train the teacher."""
        teacher = copy.deepcopy(lab.model)
        pretrain(teacher, lab.suite, _TEACHER_SEED)
        self._teacher = teacher.eval()

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Ask the teacher."""
        if self._teacher is None:
            raise ValueError("there is no teacher yet")
        labelled = batch["labels"] != IGNORE_INDEX
        with torch.no_grad():
            told, _ = self._teacher(
                batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
            )
        own, wanted = ((each[labelled].float() / _TEMPERATURE).log_softmax(dim=-1) for each in (logits, told))
        distance = functional.kl_div(own, wanted, log_target=True, reduction="batchmean")
        return 0.5 * loss + 0.5 * _TEMPERATURE**2 * distance


class NeverSaid(Twist):
    """The placeholder of images cannot be answered: its logit is minus infinity."""

    def begin(self, lab: Lab) -> None:
        """Put it behind the head."""
        token = lab.suite.tokenizer.image_token_id

        def masked(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            del module, inputs
            return output.index_fill(-1, torch.tensor([token]), float("-inf"))

        for replica in lab.replicas:
            replica.model.decoder.head.register_forward_hook(masked)


class HalfWithoutLabels(Twist):
    """Half of the samples have no label; there the model shall be sure (Grandvalet and Bengio 2004)."""

    def __init__(self) -> None:
        self._places = torch.empty(0)

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Take the labels of every second row."""
        labels = batch["labels"].clone()
        is_bare = torch.arange(len(labels)) % 2 == 1
        self._places = (labels != IGNORE_INDEX) & is_bare[:, None]
        labels[is_bare] = IGNORE_INDEX
        return Batch(**{**batch, "labels": labels})

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add the entropy where there are none."""
        said = logits[self._places].float().log_softmax(dim=-1)
        return loss - _ENTROPY_WEIGHT * (said.exp() * said).sum(dim=-1).mean()


_loss = partial(healthy_case, family=Family.OPTIMISATION)

_CASES = (
    healthy_case(
        "head_now_and_then",
        "a second head has a gradient in one of six steps",
        "tasks take turns",
        family=Family.MODEL,
        twist=HeadNowAndThen,
    ),
    _loss("weight_in_cycles", "a term's weight rises and begins anew", "cyclical annealing", twist=WeightInCycles),
    _loss("flooded", "the loss is kept at a level", "a known regularisation", twist=Flooded),
    healthy_case(
        "layer_drop",
        "a tenth of the blocks is left out, each for a whole batch",
        "a usual regularisation",
        family=Family.MODEL,
        twist=LayerDrop,
    ),
    _loss(
        "weighed_against_frequency",
        "85 % of the answers are A, and rare ones weigh more",
        "the usual remedy of lopsided classes",
        twist=WeighedAgainstFrequency,
        setup=Setup(mix={"skewed_choice": 1.0}),
        is_skewed=True,
    ),
    _loss("smoothing_of_a_fifth", "label smoothing of 0.2", "a usual regularisation", twist=StronglySmoothed),
    _loss(
        "hardest_rows",
        "of 48 samples the 24 with the larger loss are trained on",
        "mining of hard samples",
        twist=HardestRows,
        setup=Setup(batch_samples=48),
    ),
    _loss(
        "twice_under_dropout",
        "each sample stands twice in its batch",
        "R-Drop",
        twist=partial(Twice, _TWIN_DROPOUT),
        setup=Setup(batch_samples=12),
    ),
    _loss("distilled", "a teacher is half of the loss", "distillation", twist=Distilled),
    healthy_case(
        "placeholder_never_said",
        "a logit is minus infinity",
        "ids that are no answers are ruled out",
        family=Family.MODEL,
        twist=NeverSaid,
    ),
    _loss(
        "half_without_labels",
        "half of the samples have no label",
        "they are learned from in another way",
        twist=HalfWithoutLabels,
    ),
)

CASES: tuple[Case, ...] = tuple(replace(case, step_share=HALF) for case in _CASES)
