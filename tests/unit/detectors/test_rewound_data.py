"""Data that begin anew, resumes that repeat steps, and epochs in other orders."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tests.support.detector_traces import Drawn, Failure, Task, Told, trace, watched

from sidestep.worker.detectors.repeats import REMEMBERED_BATCHES, RepeatedData
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord
from sidestep.worker.watch import Watch

TASK = Task(batch=8, images=False)


def ordered(batch_of: Callable[[int], int]) -> Failure:
    """At each step the batch with the number that ``batch_of`` gives."""

    def fail(drawn: Drawn) -> None:
        draw = np.random.default_rng(batch_of(drawn.step))
        drawn.changes["sample_hashes"] = draw.integers(1, 2**62, TASK.batch)

    return fail


def found(told: Told) -> list[int]:
    return [step for step, name in told.openings if name == "data_rewound"]


def test_data_that_begin_anew_are_told_at_the_third_batch() -> None:
    told = watched(trace(TASK, 80, failure=ordered(lambda step: step if step < 60 else step - 60)))
    assert found(told) == [62]
    assert "the last 3 batches are those of 60 steps before, in the same order" in told.blocks
    assert "restore the sampler's state with the checkpoint" in told.blocks


def test_other_orders_and_short_loops_are_something_else() -> None:
    orders = [np.random.default_rng(epoch).permutation(40) for epoch in range(4)]
    assert not found(watched(trace(TASK, 160, failure=ordered(lambda step: int(orders[step // 40][step % 40])))))
    told = watched(trace(TASK, 60, failure=ordered(lambda step: step if step < 40 else 40 + step % 4)))
    assert not found(told)
    assert "dup_batch" in {name for _, name in told.openings}


def test_a_resume_that_repeats_steps_is_sound_and_one_that_begins_anew_is_not() -> None:
    for first_batch, expected in ((40, []), (0, [42])):
        watch = Watch()
        watched(trace(TASK, 60, failure=ordered(lambda step: step)), watch)
        watch.begin(1, 40)
        resumed = ordered(lambda step, first=first_batch: step - 40 + first)  # type: ignore[misc]
        assert found(watched(trace(TASK, 20, failure=resumed, first=40), watch)) == expected


def test_an_announced_stage_may_begin_the_data_anew() -> None:
    def fail(drawn: Drawn) -> None:
        ordered(lambda step: step if step < 60 else step - 60)(drawn)
        drawn.stage = "second" if drawn.step == 60 else ""

    assert not found(watched(trace(TASK, 200, failure=fail)))


def test_what_is_remembered_stays_small_and_lasts() -> None:
    family = RepeatedData(DetectorSettings())
    for step in range(REMEMBERED_BATCHES + 50):
        family.read(StepView(StepRecord(step=step, batch_digest=step + 1, samples=8)))
    state = family.state()
    assert isinstance(state, dict)
    assert len(state["batches"][0]) == 4 * REMEMBERED_BATCHES
    again = RepeatedData(DetectorSettings())
    again.restore(state)
    assert again.state() == state
