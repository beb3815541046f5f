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
        "yes_no_only", "60 % yes, 40 % no", "there is nothing else to say", Setup(mix={"yes_no": 1.0}), is_skewed=True
    ),
    _healthy(
        "mostly_a",
        "multiple choice with 85 % A",
        "the options are listed so",
        Setup(mix={"skewed_choice": 1.0}),
        is_skewed=True,
    ),
    Case(
        name="announced_switch",
        family=Family.DATA,
        what="other tasks from one step on, announced with mark_stage",
        is_failure=False,
        twist=_switched,
        onset_share=LATE,
        legitimate="a planned stage",
    ),
)
