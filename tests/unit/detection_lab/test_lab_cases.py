"""Cases: what makes one judgeable, their onsets, and the twins that failures are held against."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.detection import plan
from benchmarks.detection.campaign import SUITES, suite_named
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist
from benchmarks.detection.catalogue import PROVOKING, TUNED, all_cases, find_case, twin_of
from benchmarks.detection.causes import POINTS_TO, is_right
from benchmarks.detection.loader import encoded
from benchmarks.detection.talks import KINDS

from sidestep.worker.incident_causes import CAUSES


def failure(**changes: object) -> Case:
    told: dict[str, object] = {
        "name": "broken",
        "family": Family.DATA,
        "what": "something breaks",
        "is_failure": True,
        "blame": frozenset({Blame.DATA}),
        **changes,
    }
    return Case(**told)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "not a name"}, "short name"),
        ({"blame": frozenset()}, "blame"),
        ({"harm": Harm.INVARIANT}, "invariant"),
        ({"invariant": "words alone"}, "invariant"),
        ({"is_failure": False}, "legitimate"),
    ],
)
def test_a_case_that_cannot_be_judged_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        failure(**changes)


def test_an_onset_lies_in_its_share_and_differs_over_seeds() -> None:
    case = failure(onset_share=LATE)
    onsets = [case.onset(900, seed) for seed in range(1, 40)]
    assert min(onsets) >= 405
    assert max(onsets) < 585
    assert len(set(onsets)) > 20
    assert [case.onset(900, seed) for seed in range(1, 40)] == onsets
    assert failure().onset(900, 3) == 0


def test_every_failure_has_a_healthy_twin_of_its_setup() -> None:
    for case, _ in all_cases().values():
        if case.is_failure:
            twin = twin_of(case)
            assert not twin.is_failure
            assert twin.twist is Twist
            assert twin.setup == case.setup
            assert find_case(twin.name)[0].setup == case.setup


def test_a_setup_that_no_case_has_gets_a_twin_of_its_own() -> None:
    odd = failure(setup=Setup(batch_samples=5, num_images=37))
    assert twin_of(odd).name.startswith("twin_")
    assert twin_of(failure()).name == "mix"


def test_the_tuned_group_is_as_large_as_the_design_wants() -> None:
    tuned = [case for case, group in all_cases().values() if group == TUNED]
    assert sum(case.is_failure for case in tuned) >= 25
    assert sum(not case.is_failure for case in tuned) >= 12
    assert {case.family for case in tuned if case.is_failure} == set(Family)


def test_provoking_cases_are_healthy_short_and_odd_in_some_way() -> None:
    provoking = [case for case, group in all_cases().values() if group == PROVOKING]
    assert len(provoking) >= 24
    assert not any(case.is_failure for case in provoking)
    assert all(case.step_share < 1.0 for case in provoking)
    for case in provoking:
        first, second = case.twist(), case.twist()
        assert first is not second
        assert type(first) is not Twist or case.setup != Setup()
        assert set(case.setup.mix) <= set(KINDS)


def test_the_smoke_has_eight_failures_four_healthy_runs_and_every_twin() -> None:
    wanted = plan.smoke()
    jobs = {each.job for each in wanted}
    kinds = [find_case(each.job.case)[0].is_failure for each in wanted]
    assert (kinds.count(True), kinds.count(False)) == (8, 4)
    for job in jobs:
        if find_case(job.case)[0].is_failure:
            assert plan.twin_job(job) in jobs


def test_the_full_form_has_disjoint_seeds_in_its_splits_and_all_twins() -> None:
    wanted = plan.full(2, 900, SUITES, plan.SPLITS)
    jobs = [each.job for each in wanted]
    assert len(jobs) == len(set(jobs))
    for each in wanted:
        if find_case(each.job.case)[0].is_failure:
            assert plan.twin_job(each.job) in jobs
    seeds = {split: {each.job.seed for each in wanted if each.split == split} for split in plan.SPLITS}
    assert sum(map(len, seeds.values())) == len(set().union(*seeds.values()))


@pytest.mark.parametrize(
    ("split", "first"),
    [("tuned", 1), ("held_out_seeds", 1_001), ("known_kinds", 2_001), ("provoking_kinds", 6_001),
     ("known_fifth_kinds", 7_001), ("known_sixth_kinds", 8_001)],
)  # fmt: skip
def test_a_split_keeps_the_seeds_that_it_was_recorded_with(split: str, first: int) -> None:
    wanted = plan.full(2, 900, SUITES, [split])
    assert {each.job.seed for each in wanted} == {first, first + 1}


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("kind", KINDS)
def test_talks_carry_their_answer_shifted_and_ended(name: str, kind: str) -> None:
    suite = suite_named(name)
    talk = suite.draw(kind, 3, np.random.default_rng(0))
    tokens = suite.tokenizer
    sample = encoded(suite, talk)
    labelled = [place for place, label in enumerate(sample.labels) if label != -100]
    assert [sample.labels[place] for place in labelled] == [sample.input_ids[place + 1] for place in labelled]
    assert tokens.eos_token_id in sample.labels
    assert sample.input_ids.count(tokens.image_token_id) == len(sample.images) == (kind != "text")
    asked = [sample.labels[place] for place in labelled]
    assert tokens.decode(asked[: asked.index(tokens.eos_token_id)]).strip() == talk.answer.strip()


def test_half_the_answers_of_a_skewed_choice_would_be_too_few() -> None:
    for name in SUITES:
        suite, rng = suite_named(name), np.random.default_rng(1)
        answers = [suite.draw("skewed_choice", 5, rng).answer for _ in range(400)]
        assert 0.8 < answers.count("A") / 400 < 0.93


def test_causes_point_to_places_and_are_those_of_the_worker() -> None:
    known = {cause.name for cause in CAUSES}
    assert set(POINTS_TO) <= known
    assert known - set(POINTS_TO) == {"generation"}  # it sends nobody to a place
    case = failure(blame=frozenset({Blame.LABELS}))
    assert is_right(case, [(3, "unknown"), (9, "label_leak")])
    assert not is_right(case, [(3, "label_leak"), (9, "rate_is_zero")])
    assert not is_right(case, [])
