"""The lab's cases that were held out once hold to the lab's rules."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from benchmarks.detection import catalogue
from benchmarks.detection.case import LATE, Case, Family, Setup, Twist
from benchmarks.detection.cases import known_failures, known_healthy
from benchmarks.detection.digits_suite import DigitsSuite
from benchmarks.detection.lab import Lab
from benchmarks.detection.talks import KINDS, Encoded, encode_talk

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX

FAILURES = known_failures.CASES
HEALTHY = known_healthy.CASES
CASES = (*FAILURES, *HEALTHY)
NUM_STEPS = 900
SEEDS = range(20)


def _hooks(twist: Twist) -> set[str]:
    names = ("begin", "talk", "sample", "batch", "loss", "gradients", "rate", "after_step")
    return {name for name in names if getattr(type(twist), name) is not getattr(Twist, name)}


def test_names_are_unique_and_no_other_group_has_them() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    groups = {name: group for name, (_, group) in catalogue.all_cases().items()}  # raises where a name comes twice
    assert {name for name, group in groups.items() if group == catalogue.KNOWN} == set(names)


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


def test_each_file_gives_its_cases_to_the_list() -> None:
    parts = [
        importlib.import_module(f"benchmarks.detection.cases.{part}").CASES
        for part in ("known_data", "known_model", "known_optimisation")
    ]
    assert all(parts)
    assert [case.name for part in parts for case in part] == [case.name for case in FAILURES]


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
    image = None if talk.image is None else lab.suite.image(talk.image)
    return twist.sample(lab, encode_talk(talk, image, lab.suite.tokenizer), rng)


SAMPLE_FAILURES = tuple(case for case in FAILURES if {"talk", "sample"} & _hooks(case.twist()))


@pytest.mark.parametrize("case", SAMPLE_FAILURES, ids=lambda case: case.name)
def test_a_failure_of_samples_changes_them_and_leaves_what_can_be_trained_on(case: Case, lab: Lab) -> None:
    twist, plain = case.twist(), Twist()
    twist.begin(lab)
    num_changed = 0
    for seed in range(30):
        kind = sorted(lab.mix)[seed % len(lab.mix)]
        changed, usual = _encoded(lab, twist, kind, seed), _encoded(lab, plain, kind, seed)
        same_pixels = all(torch.equal(one, other) for one, other in zip(changed.images, usual.images, strict=True))
        same_ids = (changed.input_ids, changed.labels) == (usual.input_ids, usual.labels)
        num_changed += not (same_pixels and same_ids)
        targets = [*changed.input_ids[1:], IGNORE_INDEX]
        assert len(changed.labels) == len(changed.input_ids)
        assert all(label in {IGNORE_INDEX, target} for label, target in zip(changed.labels, targets, strict=True))
        assert any(label != IGNORE_INDEX for label in changed.labels)
        assert changed.input_ids.count(lab.suite.tokenizer.image_token_id) == len(changed.images)
    assert num_changed >= 3
