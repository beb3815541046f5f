"""Failures of images and of the way that they take, of the half that detectors are tuned on."""

from __future__ import annotations

import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Twist
from benchmarks.detection.lab import Lab
from torch import nn

from sidestep.examples.digits_vqa.packing import Batch


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


class BlackImages(Twist):
    """Every image is black, as a decoder that fails hands it out."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Replace the images."""
        black = [[lab.suite.black() for _ in row] for row in batch["images"]]
        return Batch(**{**batch, "images": black})


class ZeroedProjector(Twist):
    """The projector's weights are lost, and nobody trains them: left trainable, they are learned anew."""

    def begin(self, lab: Lab) -> None:
        """Zero and freeze them, as a checkpoint without them would, loaded for a stage that trains the rest."""
        for replica in lab.replicas:
            nn.init.zeros_(replica.model.MP.proj.weight)
            replica.model.MP.proj.weight.requires_grad_(False)  # noqa: FBT003


class DeadEncoder(Twist):
    """The vision encoder says nothing."""

    def begin(self, lab: Lab) -> None:
        """Multiply its output by zero."""
        for replica in lab.replicas:
            replica.model.vision_encoder.register_forward_hook(_silenced)


def _silenced(_module: nn.Module, _given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output * 0.0


_LOOK_AT_IMAGES = frozenset({Blame.IMAGES, Blame.MODULE})

CASES: tuple[Case, ...] = (
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
        name="images_shuffled_from_start",
        family=Family.IMAGE,
        what="images never belong to their questions: the model never learns to look",
        is_failure=True,
        twist=ShuffledImages,
        blame=frozenset({Blame.IMAGES, Blame.LABELS}),
    ),
    Case(
        name="black_images",
        family=Family.IMAGE,
        what="all images are black",
        is_failure=True,
        twist=BlackImages,
        is_exact=True,
        onset_share=LATE,
        blame=frozenset({Blame.IMAGES}),
    ),
    Case(
        name="projector_zeroed",
        family=Family.MODEL,
        what="the projector's weights are lost, and it is frozen",
        is_failure=True,
        twist=ZeroedProjector,
        is_exact=True,
        onset_share=LATE,
        blame=_LOOK_AT_IMAGES | {Blame.WEIGHTS},
    ),
    Case(
        name="projector_frozen_at_zero",
        family=Family.MODEL,
        what="the projector begins at zero and is frozen",
        is_failure=True,
        twist=ZeroedProjector,
        is_exact=True,
        blame=_LOOK_AT_IMAGES | {Blame.WEIGHTS},
    ),
    Case(
        name="encoder_dead",
        family=Family.MODEL,
        what="the vision encoder gives zeros from the start",
        is_failure=True,
        twist=DeadEncoder,
        is_exact=True,
        blame=_LOOK_AT_IMAGES,
    ),
)
