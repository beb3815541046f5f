"""The lab's cases that are held out, and those that were once, hold to the lab's rules."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from benchmarks.detection import catalogue
from benchmarks.detection.case import LATE, Case, Family, Setup, Twist
from benchmarks.detection.digits_suite import DigitsSuite
from benchmarks.detection.lab import Lab
from benchmarks.detection.loader import encoded
from benchmarks.detection.talks import KINDS, Encoded

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX

CASES_OF = {
    wanted: tuple(case for case, group in catalogue.all_cases().values() if group == wanted)
    for wanted in ("known", "known_second", catalogue.HELD_OUT)
}
GROUPS = tuple(group for group, cases in CASES_OF.items() if cases)
"""Right after held-out cases have become known ones, none are held out."""
CASES = tuple(case for group in GROUPS for case in CASES_OF[group])
FAILURES = tuple(case for case in CASES if case.is_failure)
HEALTHY = tuple(case for case in CASES if not case.is_failure)
PARTS = ("data", "model", "optimisation")
NUM_STEPS = 900
SEEDS = range(20)


def _hooks(twist: Twist) -> set[str]:
    names = ("begin", "talk", "sample", "batch", "loss", "gradients", "rate", "after_step")
    return {name for name in names if getattr(type(twist), name) is not getattr(Twist, name)}


@pytest.mark.parametrize("group", GROUPS)
def test_failures_and_healthy_ones_stand_in_their_own_files(group: str) -> None:
    failures, healthy = (
        importlib.import_module(f"benchmarks.detection.cases.{group}_{kind}").CASES for kind in ("failures", "healthy")
    )
    assert all(case.is_failure for case in failures)
    assert not any(case.is_failure for case in healthy)
    names = [case.name for case in (*failures, *healthy)]
    assert len(set(names)) == len(names)
    assert set(names) == {case.name for case in CASES_OF[group]}  # `all_cases` raises where groups share a name


@pytest.mark.parametrize("group", GROUPS)
def test_there_are_enough_of_every_family(group: str) -> None:
    failures = [case for case in CASES_OF[group] if case.is_failure]
    healthy = [case for case in CASES_OF[group] if not case.is_failure]
    assert len(failures) >= 12
    assert len(healthy) >= 9
    wanted = {Family.MODEL, Family.DATA, Family.OPTIMISATION, Family.IMAGE}
    assert wanted <= {case.family for case in failures}
    assert wanted <= {case.family for case in healthy}


@pytest.mark.parametrize("group", GROUPS)
def test_every_healthy_case_is_at_least_a_twentieth_of_the_healthy_steps(group: str) -> None:
    shares = [case.step_share for case in CASES_OF[group] if not case.is_failure]
    assert all(share / sum(shares) >= 0.05 - 1e-9 for share in shares)


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


@pytest.mark.parametrize("group", GROUPS)
def test_each_file_gives_its_failures_to_the_list(group: str) -> None:
    parts = [importlib.import_module(f"benchmarks.detection.cases.{group}_{part}").CASES for part in PARTS]
    assert all(parts)
    assert [case.name for part in parts for case in part] == [case.name for case in CASES_OF[group] if case.is_failure]


@pytest.fixture(scope="module")
def lab() -> Lab:
    suite = DigitsSuite()
    return Lab(
        suite=suite,
        setup=Setup(),
        num_steps=NUM_STEPS,
        onset=0,
        replicas=[],
        rng=np.random.default_rng(1),
        announce=lambda _: None,
        mix=dict(suite.mix),
        image_pool=list(range(suite.num_images)),
    )


def _encoded(lab: Lab, twist: Twist, kind: str, seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    talk = twist.talk(lab, lab.suite.draw(kind, seed, rng), rng)
    return twist.sample(lab, encoded(lab.suite, talk), rng)


def _are_alike(one: Encoded, other: Encoded) -> bool:
    if (one.input_ids, one.labels, len(one.images)) != (other.input_ids, other.labels, len(other.images)):
        return False
    return all(torch.equal(image, same) for image, same in zip(one.images, other.images, strict=True))


SAMPLE_FAILURES = tuple(case for case in FAILURES if {"talk", "sample"} & _hooks(case.twist()))


@pytest.mark.parametrize("case", SAMPLE_FAILURES, ids=lambda case: case.name)
def test_a_failure_of_samples_changes_them_and_leaves_what_can_be_trained_on(case: Case, lab: Lab) -> None:
    twist, plain = case.twist(), Twist()
    twist.begin(lab)
    num_changed = 0
    for seed in range(30):
        kind = sorted(lab.mix)[seed % len(lab.mix)]
        changed, usual = _encoded(lab, twist, kind, seed), _encoded(lab, plain, kind, seed)
        num_changed += not _are_alike(changed, usual)
        targets = [*changed.input_ids[1:], IGNORE_INDEX]
        assert len(changed.labels) == len(changed.input_ids)
        assert all(label in {IGNORE_INDEX, target} for label, target in zip(changed.labels, targets, strict=True))
        assert any(label != IGNORE_INDEX for label in changed.labels)
        assert changed.input_ids.count(lab.suite.tokenizer.image_token_id) == len(changed.images)
    assert num_changed >= 3
