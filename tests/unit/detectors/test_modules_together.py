"""Gradients that jump in one module, and in several at the same step: the second is no module's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support.detector_traces import Drawn, Task, trace, watched

from sidestep.worker.watch import Watch

ONSET = 120
TASK = Task(prior=(0.4, 0.3, 0.2, 0.1), final_loss=0.6, start_skill=0.5, learning_steps=1e9)
USUAL = np.array([0.2, 0.1, 0.9])


def jumping(*factors: float) -> dict[str, Any]:
    """Return the incident where the modules' gradients are so many times what they were."""

    def fail(drawn: Drawn) -> None:
        norms = USUAL * np.exp(drawn.rng.normal(0.0, 0.2, USUAL.size))
        if drawn.step >= ONSET:
            norms *= factors
        drawn.changes["module_norms"] = norms.astype(np.float32)

    watch = Watch()
    watched(trace(TASK, ONSET + 12, failure=fail), watch=watch)
    (incident,) = watch.state()["incidents"]["open"]
    assert ONSET <= incident["opened_step"] <= ONSET + 3
    return dict(incident)


@pytest.mark.parametrize(("factors", "num_risen"), [((150.0, 150.0, 150.0), 3), ((1.0, 80.0, 150.0), 2)])
def test_modules_that_jump_together_are_blamed_on_what_is_done_to_gradients(
    factors: tuple[float, ...], num_risen: int
) -> None:
    incident = jumping(*factors)
    assert (incident["name"], incident["cause"]) == ("modules_spike", "optimisation")
    (text,) = (each["text"] for each in incident["evidence"] if each["detector"] == "modules_spike")
    assert f"{num_risen} of 3 modules" in text


@pytest.mark.parametrize("factors", [(1.0, 1.0, 150.0), (3.0, 2.0, 150.0)])
def test_a_module_that_jumps_alone_is_blamed_itself(factors: tuple[float, ...]) -> None:
    """Others that rise a little with it only follow."""
    incident = jumping(*factors)
    assert (incident["name"], incident["cause"]) == ("module_spike", "module_broken")
    assert [each["detector"] for each in incident["evidence"]] == ["module_spike"]
