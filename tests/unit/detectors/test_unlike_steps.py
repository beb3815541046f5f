"""Steps that are of one task each: their rows err together, and are no evidence by themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tests.support.detector_traces import Drawn, Task, to_one_token, trace, watched

STEPS, ONSET = 400, 300
TASK = Task(options=6, start_skill=0.9, images=False)


def one_task_a_step(drawn: Drawn) -> None:
    """Every answer of a step is that of its task; two of the six tasks are taken for each other."""
    task = int(drawn.rng.integers(6))
    drawn.targets[:, 0] = task
    content = drawn.probabilities[:, 0]
    content[:] = 0.05 / 5
    if task < 2:
        content[:, :2] = 0.475
    else:
        content[:, task] = 0.95
    content[:, 6:] = 1e-4


def spoken(seed: int) -> set[str]:
    told = watched(trace(TASK, STEPS, seed=seed, failure=one_task_a_step))
    return {name for _, name in told.openings}


def test_tasks_that_come_one_a_step_are_no_excess_no_gap_and_no_leak() -> None:
    found = set[str]().union(*(spoken(seed) for seed in range(4)))
    assert not found & {"mass_excess", "mass_deficit", "confidence_gap", "cal_down", "targets_missing"}, found


def test_a_collapse_is_found_all_the_same() -> None:
    def collapsed(drawn: Drawn) -> None:
        one_task_a_step(drawn)
        if drawn.step >= ONSET:
            to_one_token(0.95, option=5)(drawn)

    told = watched(trace(TASK, STEPS, failure=collapsed))
    steps = [step for step, name in told.openings if name != "targets_missing"]
    assert steps
    assert ONSET <= steps[0] <= ONSET + 15


def test_an_easy_task_is_no_leak_where_easy_ones_come_all_the_time() -> None:
    def easy_or_hard(drawn: Drawn) -> None:
        is_easy = drawn.rng.random() < 1 / 3
        content = drawn.probabilities[:, 0]
        right = drawn.targets[:, 0]
        content[:] = 1e-3 if is_easy else 0.5 / 5
        content[np.arange(right.size), right] = 0.995 if is_easy else 0.5

    told = watched(trace(TASK, STEPS, failure=easy_or_hard))
    assert "cal_down" not in {name for _, name in told.openings}


def test_tasks_that_are_too_sure_and_too_unsure_in_turn_are_no_gap() -> None:
    def in_turns(drawn: Drawn) -> None:
        drawn.changes["entropies"] = _entropies(drawn, 0.6 if drawn.rng.random() < 0.5 else -0.6)

    told = watched(trace(Task(options=6, start_skill=0.5, learning_steps=1e9, images=False), 500, failure=in_turns))
    assert "confidence_gap" not in {name for _, name in told.openings}


def _entropies(drawn: Drawn, shift: float) -> NDArray[np.float16]:
    flat = drawn.probabilities.reshape(-1, drawn.probabilities.shape[-1])
    shifted: NDArray[np.float16] = np.maximum(-(flat * np.log(np.maximum(flat, 1e-12))).sum(-1) + shift, 0.0).astype(
        np.float16
    )
    return shifted
