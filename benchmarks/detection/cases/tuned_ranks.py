"""Failures between ranks, of the half that detectors are tuned on."""

from __future__ import annotations

from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist
from benchmarks.detection.lab import Lab

from sidestep.examples.digits_vqa.packing import Batch

_BROKEN_RANK = 2


class SharedSamples(Twist):
    """All ranks see the samples of the first one, as without a distributed sampler."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._kept: list[Batch] = []
        self._step = -1
        self._taken: dict[int, int] = {}

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:
        """Return the first rank's micro-batch of the same number."""
        if lab.step != self._step:
            self._step, self._kept, self._taken = lab.step, [], {}
        number = self._taken.get(rank, 0)
        self._taken[rank] = number + 1
        if rank == 0:
            self._kept.append(batch)
        return self._kept[number]


class BrokenRank(Twist):
    """One of four ranks sees images of other samples."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Move that rank's images by one row."""
        if rank != _BROKEN_RANK:
            return batch
        return Batch(**{**batch, "images": [*batch["images"][1:], batch["images"][0]]})


class RankLeaves(Twist):
    """One rank no longer takes part in the averaging of gradients."""

    def begin(self, lab: Lab) -> None:
        """Let it keep its own."""
        lab.unsynced_ranks.add(1)


CASES: tuple[Case, ...] = (
    Case(
        name="ranks_share_samples",
        family=Family.RANKS,
        what="both ranks train on the same samples",
        is_failure=True,
        twist=SharedSamples,
        is_exact=True,
        setup=Setup(num_ranks=2),
        onset_share=LATE,
        blame=frozenset({Blame.LOADER, Blame.RANKS}),
        harm=Harm.INVARIANT,
        invariant="no two ranks train on the same samples",
    ),
    Case(
        name="rank_corrupted",
        family=Family.RANKS,
        what="one of four ranks has the images of other samples",
        is_failure=True,
        twist=BrokenRank,
        setup=Setup(num_ranks=4),
        onset_share=LATE,
        blame=frozenset({Blame.RANKS, Blame.IMAGES}),
    ),
    Case(
        name="rank_unsynced",
        family=Family.RANKS,
        what="one of two ranks skips the averaging of gradients",
        is_failure=True,
        twist=RankLeaves,
        is_exact=True,
        setup=Setup(num_ranks=2),
        onset_share=LATE,
        blame=frozenset({Blame.RANKS}),
        harm=Harm.INVARIANT,
        invariant="replicas hold the same weights",
    ),
)
