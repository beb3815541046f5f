"""An untrained model whose loss does not fall, and those that take their time or had learned before."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from tests.support.detector_traces import VOCABULARY, Drawn, Task, Told, trace, watched

from sidestep.worker.watch import Watch

UNIFORM = math.log(VOCABULARY)
TASK = Task(options=8, images=False)


def losing(
    loss_of: Callable[[int], float], rate_of: Callable[[int], float] = lambda _: 1e-3
) -> Callable[[Drawn], None]:
    def fail(drawn: Drawn) -> None:
        drawn.rate = rate_of(drawn.step)
        rows = drawn.targets.size
        losses = np.full(rows, loss_of(drawn.step)) + drawn.rng.normal(0.0, 0.1, rows)
        drawn.changes.update(losses=losses.astype(np.float16), entropies=np.full(rows, losses.mean(), np.float16))
        drawn.changes["trainer_losses"] = np.array([losses.mean()], np.float32)

    return fail


def found(told: Told) -> list[int]:
    return [step for step, name in told.openings if name == "nothing_learned"]


def test_a_loss_that_stays_where_it_began_is_told_soon_after_the_warm_up() -> None:
    (step,) = found(watched(trace(TASK, 80, failure=losing(lambda _: UNIFORM))))
    assert step <= 25
    warming = losing(lambda _: UNIFORM, lambda step: 1e-3 * min(1.0, (step + 1) / 30))
    told = watched(trace(TASK, 80, failure=warming))
    (step,) = found(told)
    assert 49 <= step <= 55
    assert "overfit one batch first" in told.blocks


@pytest.mark.parametrize(
    ("loss_of", "rate_of"),
    [
        (lambda step: UNIFORM * max(0.3, 1.0 - step / 60), lambda _: 1e-3),
        (lambda _: UNIFORM, lambda step: 1e-6 * (step + 1)),
        (lambda _: 0.4, lambda _: 1e-3),
        (lambda step: UNIFORM if step < 10 or step > 30 else 0.5 * UNIFORM, lambda _: 1e-3),
        (lambda _: UNIFORM, lambda _: 0.0),
    ],
    ids=["learns", "warms up", "has learned before", "learned, and meets another task", "no rate"],
)
def test_what_learns_or_need_not_yet_is_left_alone(
    loss_of: Callable[[int], float], rate_of: Callable[[int], float]
) -> None:
    assert not found(watched(trace(TASK, 100, failure=losing(loss_of, rate_of))))


def test_it_goes_on_after_a_restart() -> None:
    steps = list(trace(TASK, 60, failure=losing(lambda _: UNIFORM)))
    first, second = Watch(), Watch()
    watched(steps[:15], first)
    second.restore(first.state())
    assert found(watched(steps[15:], second)) == found(watched(steps))
