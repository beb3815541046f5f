"""Targets that do not come any more, and what comes seldom or in turns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.detector_traces import Drawn, Failure, Task, Told, context, trace, watched

from sidestep.worker.detectors.missing_targets import LET_GO, MAX_IDS, MissingTargets
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.record_building import build_record
from sidestep.worker.watch import Watch

ONSET = 200
TASK = Task(options=8, start_skill=0.9, images=False)


def openings(told: Told) -> list[int]:
    return [step for step, name in told.openings if name == "targets_missing"]


def without_the_last(number: int) -> Failure:
    """Samples with one of the last options do not come: others come in their place."""

    def fail(drawn: Drawn) -> None:
        gone = drawn.targets[:, 0] >= TASK.options - number
        others = drawn.rng.choice(np.flatnonzero(~gone), int(gone.sum()))
        drawn.targets[gone], drawn.probabilities[gone] = drawn.targets[others], drawn.probabilities[others]

    return fail


def test_a_lost_part_of_the_data_is_found_as_soon_as_it_is_no_chance() -> None:
    told = watched(trace(TASK, ONSET + 40, failure=without_the_last(3), onset=ONSET))
    (step,) = openings(told)
    assert ONSET + 5 <= step <= ONSET + 30
    assert "do not come any more" in told.blocks
    assert "a shard, a task or a language is lost" in told.blocks


@pytest.mark.parametrize("number", [0, 1])
def test_one_rare_kind_less_is_nothing(number: int) -> None:
    assert not openings(watched(trace(TASK, ONSET + 60, failure=without_the_last(number), onset=ONSET)))


def test_targets_that_come_in_turns_are_not_missed() -> None:
    def in_turns(drawn: Drawn) -> None:
        drawn.targets[:, 0] = drawn.step // 5 % 4 * 2 + drawn.targets[:, 0] % 2

    assert not openings(watched(trace(TASK, 500, failure=in_turns)))


def test_what_the_first_answer_held_says_nothing_of_how_often_it_comes() -> None:
    family = MissingTargets(DetectorSettings())
    for step in trace(Task(batch=1), 130):
        ids = np.arange(7, 10) if step.step == 0 else np.arange(10, 28)  # a short answer, then long ones
        record = replace(build_record(step, context()), targets=ids.astype(np.int32))
        assert not any(reading.is_beyond for reading in family.read(StepView(record, context())))


def test_an_announced_stage_begins_anew() -> None:
    def fail(drawn: Drawn) -> None:
        drawn.stage = "second" if drawn.step == ONSET else ""
        without_the_last(3)(drawn)

    assert not openings(watched(trace(TASK, ONSET + 150, failure=fail, onset=ONSET)))


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    steps = list(trace(TASK, ONSET + 40, failure=without_the_last(3), onset=ONSET))
    whole, first, second = Watch(), Watch(), Watch()
    expected = watched(steps, whole)
    watched(steps[:ONSET], first)
    second.restore(first.state())
    assert openings(watched(steps[ONSET:], second)) == openings(expected)
    assert second.state() == whole.state()


def test_what_is_followed_stays_small_and_is_let_go_of() -> None:
    family = MissingTargets(DetectorSettings())
    many = Task(options=400, start_skill=0.9, batch=64, images=False)
    for step in trace(many, 80):
        family.read(StepView(build_record(step, context())))
    state = family.state()
    assert isinstance(state, dict)
    ids, _, _, missed, _ = (np.frombuffer(each, "<f8") for each in state["targets"])
    assert 0 < ids.size <= MAX_IDS
    assert missed.max() < LET_GO
