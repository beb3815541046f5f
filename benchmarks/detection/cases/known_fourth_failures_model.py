"""Failures of the model and of ranks that were held out: its layers, its weights, and what ranks share."""

from __future__ import annotations

from functools import partial

import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist, failure_case
from benchmarks.detection.lab import Lab
from torch import nn

from sidestep.examples.digits_vqa.packing import Batch

_CAP = 3.0
_FINAL_SPARSITY = 0.97
_SPREAD_FLOOR = 1e-5
_FAULTY_RANK = 2
_FAULTY_STRIDE, _FAULTY_FACTOR = 4, -64.0


class LogitsCapped(Twist):
    """The cap of attention's logits is taken for those of the head: none is above 3, and no answer is certain."""

    def begin(self, lab: Lab) -> None:
        """Cap what the head gives."""
        for replica in lab.replicas:
            replica.model.decoder.head.register_forward_hook(self._capped)

    @staticmethod
    def _capped(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        return _CAP * (output / _CAP).tanh()


class BatchStatistics(Twist):
    """A batch normalisation behind the projector never updates its running statistics, which inference takes."""

    def begin(self, lab: Lab) -> None:
        """Normalise in training alone: running statistics of mean 0 and variance 1 change nothing."""
        for replica in lab.replicas:
            replica.model.MP.register_forward_hook(self._normalised)

    @staticmethod
    def _normalised(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del inputs
        if not module.training or len(output) < 2:
            return output
        spread = (output.var(dim=0, keepdim=True, unbiased=False) + _SPREAD_FLOOR).sqrt()
        return (output - output.mean(dim=0, keepdim=True)) / spread


class PatchesAveraged(Twist):
    """The encoder's pooled features are passed on in the place of its patches: all patches are their mean."""

    def begin(self, lab: Lab) -> None:
        """Pool behind the encoder."""
        for replica in lab.replicas:
            replica.model.vision_encoder.register_forward_hook(self._pooled)

    @staticmethod
    def _pooled(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        return output.mean(dim=1, keepdim=True).expand_as(output)


class PruningRunsOn(Twist):
    """Magnitude pruning follows its cubic schedule past the target, up to 97 % (Zhu and Gupta, arXiv:1710.01878)."""

    def after_step(self, lab: Lab) -> None:
        """Zero the smallest weights of the language model's blocks."""
        share = (lab.step + 1 - lab.onset) / (lab.num_steps - lab.onset)
        sparsity = _FINAL_SPARSITY * (1 - (1 - share) ** 3)
        with torch.no_grad():
            for replica in lab.replicas:
                for weight in replica.model.decoder.blocks.parameters():
                    if weight.dim() > 1:
                        size = weight.abs()
                        least = size.flatten().kthvalue(max(1, int(sparsity * weight.numel()))).values
                        weight.masked_fill_(size <= least, 0.0)


class ImagesOfTheFirstRank(Twist):
    """Texts are scattered, images are broadcast: every rank has the images of the first one."""

    def __init__(self) -> None:
        self._images: list[list[torch.Tensor]] = []

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Hand out the first rank's images; samples without one keep none."""
        if rank == 0:
            self._images = batch["images"]
            return batch
        tiles = [image for row in self._images for image in row]
        if not tiles:
            return batch
        places = iter(range(sum(len(row) for row in batch["images"])))
        images = [[tiles[next(places) % len(tiles)] for _ in row] for row in batch["images"]]
        return Batch(**{**batch, "images": images})


class OneCoreComputesWrongly(Twist):
    """A core of one rank of four gives wrong products in silence: every fourth row of its gradients is off.

    "Cores that don't count" (Hochschild et al. 2021) and the reports of large runs tell of such machines.
    """

    def begin(self, lab: Lab) -> None:
        """Spoil the gradients of that rank before they are averaged."""
        for weight in lab.replicas[_FAULTY_RANK].model.parameters():
            if weight.dim() > 1:
                weight.register_hook(self._spoilt)  # type: ignore[no-untyped-call]

    @staticmethod
    def _spoilt(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt[::_FAULTY_STRIDE] *= _FAULTY_FACTOR
        return spoilt


class ProjectorOutsideTheAveraging(Twist):
    """Only the two towers are wrapped for the reduction: each rank's projector follows its own samples.

    kohya-ss/sd-scripts#989 and OpenTSLM/OpenTSLM#49 are about modules that the wrapper does not see.
    """

    def __init__(self) -> None:
        self._own: dict[tuple[int, str], torch.Tensor] = {}

    def begin(self, lab: Lab) -> None:
        """Keep each rank's own gradients of the projector."""
        for replica in lab.replicas:
            for name, weight in replica.model.MP.named_parameters():
                kept = partial(self._keep, (replica.rank, name))
                weight.register_post_accumulate_grad_hook(kept)  # type: ignore[no-untyped-call]

    def _keep(self, place: tuple[int, str], weight: torch.Tensor) -> None:
        if weight.grad is not None:
            self._own[place] = weight.grad.clone()

    def gradients(self, lab: Lab) -> None:
        """Put them in the place of the averaged ones."""
        for replica in lab.replicas:
            for name, weight in replica.model.MP.named_parameters():
                own = self._own.pop((replica.rank, name), None)
                if own is not None:
                    weight.grad = own


_MODULE = frozenset({Blame.MODULE})
_failure = partial(failure_case, Family.MODEL)

CASES: tuple[Case, ...] = (
    _failure("logits_capped_at_three", "no logit is above 3", LogitsCapped, _MODULE),
    _failure(
        "batch_statistics_in_training",
        "pictures are normalised over the batch in training alone, from the start",
        BatchStatistics,
        _MODULE | {Blame.IMAGES},
        onset_share=None,
    ),
    _failure("patches_averaged", "all patches of an image are their mean", PatchesAveraged, _MODULE | {Blame.IMAGES}),
    _failure("pruning_runs_on", "up to 97 % of the weights are pruned", PruningRunsOn, _MODULE | {Blame.WEIGHTS}),
    failure_case(
        Family.RANKS,
        "images_of_the_first_rank",
        "both ranks have the images of the first one",
        ImagesOfTheFirstRank,
        frozenset({Blame.RANKS, Blame.IMAGES, Blame.DATA, Blame.LOADER}),
        setup=Setup(num_ranks=2),
    ),
    failure_case(
        Family.RANKS,
        "one_core_computes_wrongly",
        "a quarter of one rank's gradients is wrong",
        OneCoreComputesWrongly,
        frozenset({Blame.RANKS, Blame.OPTIMISER, Blame.MODULE, Blame.WEIGHTS}),
        setup=Setup(num_ranks=4),
    ),
    Case(
        name="projector_outside_the_averaging",
        family=Family.RANKS,
        what="each of two ranks trains a projector of its own",
        is_failure=True,
        twist=ProjectorOutsideTheAveraging,
        setup=Setup(num_ranks=2),
        onset_share=LATE,
        blame=frozenset({Blame.RANKS, Blame.MODULE, Blame.WEIGHTS, Blame.OPTIMISER}),
        harm=Harm.INVARIANT,
        invariant="all ranks hold the same weights",
        is_exact=True,
    ),
)
