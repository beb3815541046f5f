"""Healthy trainings that look odd, of the half that detectors are tuned on."""

from __future__ import annotations

from benchmarks.detection.case import LATE, Case, Family, Setup, Twist
from benchmarks.detection.lab import Lab


class NewMix(Twist):
    """The data are switched on purpose."""

    def __init__(self, mix: dict[str, float], name: str = "") -> None:
        """Switch to `mix` at the onset, and announce it where there is a name."""
        self._mix = mix
        self._name = name

    def begin(self, lab: Lab) -> None:
        """Switch."""
        lab.mix = self._mix
        if self._name:
            lab.announce(self._name)


def _switched() -> NewMix:
    return NewMix({"table": 0.5, "caption": 0.5}, "tables")


def _switched_silently() -> NewMix:
    return NewMix({"table": 0.5, "caption": 0.5})


def _healthy(name: str, what: str, legitimate: str, setup: Setup, *, is_skewed: bool = False) -> Case:
    return Case(
        name=name,
        family=Family.DATA,
        what=what,
        is_failure=False,
        setup=setup,
        legitimate=legitimate,
        is_skewed=is_skewed,
    )


CASES: tuple[Case, ...] = (
    _healthy("mix", "the suite's usual mix", "nothing is odd", Setup()),
    _healthy(
        "yes_no_only",
        "a trained model is tuned on 60 % yes, 40 % no",
        "there is nothing else to say",
        Setup(mix={"yes_no": 1.0}, pretrained=True),
        is_skewed=True,
    ),
    _healthy(
        "mostly_a",
        "multiple choice with 85 % A",
        "the options are listed so",
        Setup(mix={"skewed_choice": 1.0}),
        is_skewed=True,
    ),
    _healthy("captions", "captions alone", "one task of one form", Setup(mix={"caption": 1.0})),
    _healthy("tables", "tables alone", "rows repeat their frame", Setup(mix={"table": 1.0}), is_skewed=True),
    _healthy("text", "text without images", "nothing is asked about an image", Setup(mix={"text": 1.0})),
    _healthy("batch_of_8", "eight samples a step", "small batches are noisy", Setup(batch_samples=8)),
    _healthy(
        "memorised",
        "64 images, seen again and again",
        "a small data set is learned by heart",
        Setup(num_images=64),
        is_skewed=True,
    ),
    _healthy("warm_start", "a language model that has read before", "pretrained", Setup(warm_start=True)),
    _healthy("double_rate", "twice the learning rate", "bold, and it learns", Setup(rate_factor=2.0)),
    _healthy("packed_rows", "four samples a row", "nanoVLM packs", Setup(samples_per_row=4)),
    _healthy("two_microbatches", "gradients are accumulated", "usual", Setup(accumulation_steps=2)),
    _healthy("ranks_2", "two ranks", "usual", Setup(num_ranks=2)),
    _healthy("ranks_4", "four ranks of six samples", "usual", Setup(num_ranks=4)),
    Case(
        name="announced_switch",
        family=Family.DATA,
        what="other tasks from one step on, announced with mark_stage",
        is_failure=False,
        twist=_switched,
        onset_share=LATE,
        legitimate="a planned stage",
    ),
    Case(
        name="unannounced_switch",
        family=Family.DATA,
        what="other tasks from one step on, and nobody says so",
        is_failure=False,
        twist=_switched_silently,
        onset_share=LATE,
        legitimate="planned, but nobody can know: counted apart",
        announced=False,
    ),
)
