"""A gradient that has become smaller for good, and what makes one smaller in a healthy run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tests.support.detector_traces import Drawn, Task, trace, watched

ONSET = 160
TASK = Task(prior=(0.4, 0.3, 0.2, 0.1), final_loss=0.6, start_skill=0.5, learning_steps=1e9)


def norms(factor_of: Callable[[int], float]) -> Callable[[Drawn], None]:
    """Gradients with a usual scatter, times a factor that depends on the step."""

    def fail(drawn: Drawn) -> None:
        norm = factor_of(drawn.step) * float(np.exp(drawn.rng.normal(0.0, 0.2)))
        drawn.changes["gradient_norm"] = np.array([norm], np.float32)

    return fail


def falls(factor_of: Callable[[int], float], steps: int = ONSET + 60) -> list[int]:
    told = watched(trace(TASK, steps, failure=norms(factor_of)))
    return [step for step, name in told.openings if name == "grad_fall"]


def test_a_gradient_of_which_an_eighth_is_left_is_found_within_twenty_steps() -> None:
    (step,) = falls(lambda step: 0.125 if step >= ONSET else 1.0)
    assert ONSET + 5 <= step <= ONSET + 20


def test_a_gradient_that_falls_little_or_grows_or_swings_is_none() -> None:
    assert not falls(lambda step: 0.5 if step >= ONSET else 1.0)
    assert not falls(lambda step: 8.0 if step >= ONSET else 1.0)
    assert not falls(lambda step: 4.0 if step % 3 else 0.2, steps=400)


def test_a_gradient_that_falls_with_the_loss_is_none() -> None:
    def learned(drawn: Drawn) -> None:
        norms(lambda _: 0.125 if drawn.step >= ONSET else 1.0)(drawn)
        if drawn.step >= ONSET:
            rows, places = np.indices(drawn.targets.shape)
            drawn.probabilities *= 0.3
            drawn.probabilities[rows, places, drawn.targets] += 0.7

    told = watched(trace(TASK, ONSET + 60, failure=learned))
    assert "grad_fall" not in {name for _, name in told.openings}
