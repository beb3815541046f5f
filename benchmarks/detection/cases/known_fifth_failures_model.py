"""Failures of the model and of ranks, held out until the fifth evaluation: attention, what learns, what differs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist, failure_case
from benchmarks.detection.cases.known_fifth_failures_data import any_of, class_names
from benchmarks.detection.cases.known_model import decoder_blocks
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.cases.known_third_healthy import LowRankLinear
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Talk
from torch import nn

from sidestep.examples.digits_vqa.packing import Batch

_NUM_LEVELS = 3
_LARGEST_NORM = 0.1
_LOSS_SCALE = 1024.0
_SCALED_RANK = 3
_SLOW_RANK_SHARE = 0.03


class PlaceholdersMaskedOut(Twist):
    """The attention mask is made by comparing ids with padding's, and placeholders of images count as padding."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Hide the images' places."""
        is_image = batch["input_ids"] == lab.suite.tokenizer.image_token_id
        return Batch(**{**batch, "attention_mask": batch["attention_mask"].masked_fill(is_image, 0)})


class FewBits(Twist):
    """What linear maps give is rounded to seven levels, with one scale for a whole tensor."""

    def begin(self, lab: Lab) -> None:
        """Round behind every linear map of the language model's blocks."""
        for block in decoder_blocks(lab):
            for part in block.children():
                if isinstance(part, nn.Linear):
                    part.register_forward_hook(self._rounded)

    @staticmethod
    def _rounded(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        scale = output.detach().abs().max().clamp(min=1e-8) / _NUM_LEVELS
        return output + ((output / scale).round() * scale - output).detach()


class AdapterBeginsAtZero(Twist):
    """Both halves of an adapter begin at zero, where one of them should: neither ever gets a gradient."""

    def begin(self, lab: Lab) -> None:
        """Put such adapters beside all linear maps of the blocks, and step them alone."""
        for replica in lab.replicas:
            replica.model.requires_grad_(requires_grad=False)
            for block in replica.model.decoder.blocks:
                for name, part in list(block.named_children()):
                    if isinstance(part, nn.Linear):
                        adapted = LowRankLinear(part, lab.rng)
                        nn.init.zeros_(adapted.down)
                        setattr(block, name, adapted)
            learned = [each for each in replica.model.parameters() if each.requires_grad]
            replica.optimizer = torch.optim.AdamW(learned, lr=peak_rate(lab), weight_decay=0.0)


class MaxNormTooSmall(Twist):
    """A constraint holds the norm of each row of weights below 0.1, where 10 was meant."""

    def after_step(self, lab: Lab) -> None:
        """Shrink what is larger."""
        with torch.no_grad():
            for block in decoder_blocks(lab):
                for weight in block.parameters():
                    if weight.dim() > 1:
                        weight.copy_(torch.renorm(weight, 2, 0, _LARGEST_NORM))


class ClassesInAnyOrder(Twist):
    """Each process makes its table of classes from a set, whose order is another one in each process."""

    def __init__(self) -> None:
        self._drawn = 0
        self._renamed: dict[str, str] = {}

    def begin(self, lab: Lab) -> None:
        """Draw the second rank's table."""
        names = class_names(lab)
        self._renamed = dict(zip(names, (names[each] for each in lab.rng.permutation(len(names))), strict=True))

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Rename the classes of the second rank's answers; ranks take turns in a step's samples."""
        rank = self._drawn % lab.setup.num_ranks
        self._drawn += 1
        if rank != 1:
            return talk
        return replace(talk, answer=any_of(class_names(lab)).sub(lambda found: self._renamed[found[0]], talk.answer))


class OneRankNotUnscaled(Twist):
    """The loss is scaled for half precision, and one rank of four does not take its gradients back."""

    def begin(self, lab: Lab) -> None:
        """Scale that rank's gradients before they are averaged."""
        for weight in lab.replicas[_SCALED_RANK].model.parameters():
            weight.register_hook(self._scaled)  # type: ignore[no-untyped-call]

    @staticmethod
    def _scaled(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * _LOSS_SCALE


class ScheduleOfItsOwn(Twist):
    """A scheduler that watches the loss sees each rank's own, and lowers the second rank's rate alone."""

    def begin(self, lab: Lab) -> None:
        """Lower it."""
        for group in lab.replicas[1].optimizer.param_groups:
            group["rate_share"] = _SLOW_RANK_SHARE


_MODULE = frozenset({Blame.MODULE})
_failure = partial(failure_case, Family.MODEL)

CASES: tuple[Case, ...] = (
    _failure(
        "placeholders_masked_out",
        "nothing may look at the images' places",
        PlaceholdersMaskedOut,
        _MODULE | {Blame.IMAGES, Blame.LOADER, Blame.DATA},
        is_exact=True,
    ),
    _failure("activations_of_seven_levels", "activations are rounded to seven levels", FewBits, _MODULE),
    _failure(
        "adapter_begins_at_zero",
        "both halves of the adapters are zero, from the start",
        AdapterBeginsAtZero,
        _MODULE | {Blame.WEIGHTS, Blame.OPTIMISER},
        onset_share=None,
        setup=Setup(pretrained=True, mix={"caption": 0.5, "table": 0.5}),
        is_exact=True,
    ),
    _failure(
        "max_norm_too_small",
        "rows of weights are held small",
        MaxNormTooSmall,
        frozenset({Blame.WEIGHTS, Blame.OPTIMISER}),
    ),
    failure_case(
        Family.RANKS,
        "classes_in_any_order",
        "the second rank has other names for the classes, from the start",
        ClassesInAnyOrder,
        frozenset({Blame.RANKS, Blame.LABELS, Blame.DATA}),
        onset_share=None,
        setup=Setup(num_ranks=2),
    ),
    failure_case(
        Family.RANKS,
        "one_rank_not_unscaled",
        "one of four ranks has gradients 1024 times too large",
        OneRankNotUnscaled,
        frozenset({Blame.RANKS, Blame.OPTIMISER}),
        setup=Setup(num_ranks=4),
    ),
    Case(
        name="schedule_of_its_own",
        family=Family.RANKS,
        what="one of two ranks steps at 3 % of the rate",
        is_failure=True,
        twist=ScheduleOfItsOwn,
        setup=Setup(num_ranks=2),
        onset_share=LATE,
        blame=frozenset({Blame.RANKS, Blame.RATE, Blame.OPTIMISER, Blame.WEIGHTS}),
        harm=Harm.INVARIANT,
        invariant="all ranks hold the same weights",
        is_exact=True,
    ),
)
