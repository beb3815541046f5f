"""The held-out half of the lab's cases holds to the lab's rules."""

from __future__ import annotations

import importlib

import pytest
from benchmarks.detection import catalogue, held_out_failures, held_out_healthy
from benchmarks.detection.case import LATE, Case, Family, Setup, Twist
from benchmarks.detection.talks import KINDS

FAILURES = held_out_failures.CASES
HEALTHY = held_out_healthy.CASES
CASES = (*FAILURES, *HEALTHY)
NUM_STEPS = 900
SEEDS = range(20)


def _hooks(twist: Twist) -> set[str]:
    names = ("begin", "talk", "sample", "batch", "loss", "gradients", "rate", "after_step")
    return {name for name in names if getattr(type(twist), name) is not getattr(Twist, name)}


def test_names_are_unique_and_the_tuned_half_has_none_of_them() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    halves = {name: half for name, (_, half) in catalogue.all_cases().items()}  # raises where a name comes twice
    assert {name for name, half in halves.items() if half == catalogue.HELD_OUT} == set(names)
    assert {half for name, half in halves.items() if name not in names} == {catalogue.TUNED}


def test_there_are_enough_of_every_family() -> None:
    assert len(FAILURES) >= 12
    assert len(HEALTHY) >= 9
    assert all(case.is_failure for case in FAILURES)
    assert not any(case.is_failure for case in HEALTHY)
    wanted = {Family.MODEL, Family.DATA, Family.OPTIMISATION, Family.IMAGE}
    assert wanted <= {case.family for case in FAILURES}
    assert wanted <= {case.family for case in HEALTHY}


def test_every_healthy_case_is_at_least_a_twentieth_of_the_healthy_steps() -> None:
    total = sum(case.step_share for case in HEALTHY)
    assert all(case.step_share / total >= 0.05 - 1e-9 for case in HEALTHY)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_builds_its_twist_anew_for_every_run(case: Case) -> None:
    first, second = case.twist(), case.twist()
    assert first is not second
    assert isinstance(first, Twist)
    assert type(first) is type(second)
    assert set(case.setup.mix) <= set(KINDS)


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.name)
def test_a_failure_does_something_to_the_training(case: Case) -> None:
    assert _hooks(case.twist())


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_case_is_odd_in_some_way(case: Case) -> None:
    assert _hooks(case.twist()) or case.setup != Setup()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_onset_is_drawn_late_or_is_the_start(case: Case) -> None:
    onsets = {case.onset(NUM_STEPS, seed) for seed in SEEDS}
    if case.onset_share is None:
        assert onsets == {0}
        return
    assert case.onset_share == LATE
    low, high = (share * NUM_STEPS for share in LATE)
    assert len(onsets) > 1
    assert all(low <= onset < high for onset in onsets)


def test_the_files_end_in_their_cases() -> None:
    for part in ("held_out_data", "held_out_model", "held_out_optimisation"):
        cases = importlib.import_module(f"benchmarks.detection.{part}").CASES
        assert set(cases) <= set(FAILURES)
        assert cases
