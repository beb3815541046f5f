"""Failures of the half that detectors are tuned on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Twist
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import Talk

from sidestep.examples.digits_vqa.packing import Batch


class EveryLabelIsA(Twist):
    """Every answer is the letter A."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Replace the answer."""
        return replace(talk, answer="A")


class ShuffledImages(Twist):
    """Images belong to other samples of the batch."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Shuffle the images among the rows that have one."""
        rows = [place for place, images in enumerate(batch["images"]) if images]
        order = lab.rng.permutation(rows)
        images = list(batch["images"])
        for place, source in zip(rows, order, strict=True):
            images[place] = batch["images"][source]
        return Batch(**{**batch, "images": images})


class ZeroedProjector(Twist):
    """The projector's weights are zero."""

    def begin(self, lab: Lab) -> None:
        """Zero them, as a checkpoint without them would."""
        with torch.no_grad():
            for replica in lab.replicas:
                replica.model.MP.proj.weight.zero_()


CASES: tuple[Case, ...] = (
    Case(
        name="labels_become_a",
        family=Family.DATA,
        what="a broken answer column: every answer is A",
        is_failure=True,
        twist=EveryLabelIsA,
        onset_share=LATE,
        blame=frozenset({Blame.DATA, Blame.LABELS}),
    ),
    Case(
        name="images_shuffled",
        family=Family.IMAGE,
        what="images stand in other samples' places",
        is_failure=True,
        twist=ShuffledImages,
        onset_share=LATE,
        blame=frozenset({Blame.IMAGES, Blame.LABELS}),
    ),
    Case(
        name="projector_zeroed",
        family=Family.MODEL,
        what="the projector's weights are lost",
        is_failure=True,
        twist=ZeroedProjector,
        onset_share=LATE,
        blame=frozenset({Blame.MODULE, Blame.IMAGES, Blame.WEIGHTS}),
    ),
)
