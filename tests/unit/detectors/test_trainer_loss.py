"""The trainer's own loss beside the cross-entropy: whatever it always was is right, and what it becomes is told."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.detector_traces import Drawn, Failure, Task, shuffled_targets, trace, watched

TASK = Task(batch=32, final_loss=0.4)
ONSET = 120


def cross_entropy(drawn: Drawn) -> float:
    flat = drawn.probabilities.reshape(-1, drawn.probabilities.shape[-1])
    chosen = flat[np.arange(drawn.targets.size), drawn.targets.reshape(-1)]
    return float(-np.log(np.maximum(chosen, 1e-12)).mean())


def smoothed(drawn: Drawn, share: float = 0.1) -> float:
    logs = np.log(np.maximum(drawn.probabilities, 1e-12))
    return (1.0 - share) * cross_entropy(drawn) - share * float(logs.mean())


def told(loss: float) -> dict[str, object]:
    return {"trainer_losses": np.array([loss], np.float32)}


LOSSES = {
    "a temperature": lambda drawn: 0.6 * cross_entropy(drawn),
    "a sum in the place of a mean": lambda drawn: 96 * cross_entropy(drawn),
    "divided by the accumulation twice": lambda drawn: cross_entropy(drawn) / 4,
    "another term": lambda drawn: cross_entropy(drawn) + 0.5,
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_becomes_another_is_found_within_ten_steps(kind: str) -> None:
    def fail(drawn: Drawn) -> None:
        drawn.changes.update(told(LOSSES[kind](drawn)))

    found = watched(trace(TASK, ONSET + 30, failure=fail, onset=ONSET))
    assert found.openings[0][1] == "loss_differs"
    assert ONSET <= found.openings[0][0] <= ONSET + 10
    assert "the loss has become another" in found.blocks


@pytest.mark.parametrize("kind", [*LOSSES, "smoothing"])
def test_one_that_was_so_from_the_start_is_right(kind: str) -> None:
    def always(drawn: Drawn) -> None:
        drawn.changes.update(told(smoothed(drawn) if kind == "smoothing" else LOSSES[kind](drawn)))

    assert not watched(trace(TASK, 250, failure=always)).openings


def test_wrong_targets_are_not_another_loss() -> None:
    def fail(drawn: Drawn) -> None:
        shuffled_targets(drawn)
        drawn.changes.update(told(cross_entropy(drawn)))

    found = watched(trace(TASK, ONSET + 30, failure=fail, onset=ONSET))
    assert "loss_differs" not in [name for _, name in found.openings]
    assert found.openings


def test_of_a_sample_the_noise_is_allowed_for() -> None:
    """A dozen rows of 96, and the trainer's number over all of them."""

    def thinned(drawn: Drawn) -> None:
        whole = cross_entropy(drawn)
        kept = drawn.rng.permutation(drawn.targets.shape[0])[:4]
        drawn.targets, drawn.probabilities = drawn.targets[kept], drawn.probabilities[kept]
        drawn.changes.update(labelled=96, sampled=True, **told(whole))

    failure: Failure = thinned
    assert not [name for _, name in watched(trace(TASK, 300, failure=failure)).openings if name == "loss_differs"]
