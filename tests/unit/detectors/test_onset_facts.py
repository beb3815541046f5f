"""What went with a failure's first step: facts that tell targets, inputs, the model and its updates apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sidestep.worker.detectors.facts import FACTS, OnsetFacts
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

ROWS, ANSWERS = 96, 32
COUNTS = {"positions": 800, "padding": 32, "labelled": ROWS, "answers": ANSWERS, "labels_masked": 0}


def step(number: int, *, rise: float = 0.0, later: float = 0.0, sure: float = 1.0, **changes: Any) -> StepView:
    """A sound step, but for what is changed: ``rise`` of the loss, entropies of first and of later tokens."""
    rng = np.random.default_rng(number)
    entropies = np.tile([sure, 0.5 + later, 0.1], ANSWERS) + 0.02 * rng.normal(size=ROWS)
    told: dict[str, Any] = {
        "step": number,
        "counts": COUNTS,
        "targets": np.zeros(ROWS, np.int32),
        "losses": np.zeros(ROWS, np.float16),
        "entropies": entropies.astype(np.float16),
        "places": np.tile([0, 1, 2], ANSWERS).astype(np.uint8),
        "loss": 0.5 + 0.03 * float(rng.normal()) + rise,
        "entropy": float(entropies.mean()),
        "gradient_norm": 1.0 + 0.02 * float(rng.normal()),
        "image_mean": 0.3,
        "image_deviation": 1.0,
        "projector_rms": 0.7,
        "projector_spread": 0.2,
        "rates": np.array([1e-3]),
        **changes,
    }
    view = StepView(StepRecord(**told))
    view.target_cost, view.weights_moved, view.update_size = 2.0 + 0.1 * float(rng.normal()), 1.0, 1.0
    return view


def learned(steps: int = 100) -> OnsetFacts:
    facts = OnsetFacts()
    for number in range(steps):
        facts.take(step(number))
    return facts


def after(*views: StepView) -> frozenset[str]:
    """Return what is found where these follow on a hundred sound steps and the last one makes a detector speak."""
    facts = learned()
    for view in views:
        facts.take(view)
    return facts.around(views[-1].record.step)


def test_without_a_rise_there_is_nothing_to_tell() -> None:
    assert learned().around(99) == frozenset()
    assert OnsetFacts().around(0) == frozenset()


def test_wrong_targets_leave_the_model_as_sure_as_it_was_at_first_tokens() -> None:
    """Later tokens follow on the wrong answer, which makes the model unsure of how it goes on."""
    found = after(*(step(number, rise=1.5, later=1.0) for number in (100, 101, 102)))
    assert found == {"abrupt", "outputs_unchanged", "weights_steady"}


def rises(*of: float) -> frozenset[str]:
    """Return what is found where the loss is up by so much at steps on end and a detector speaks at the last."""
    return after(*(step(100 + place, rise=rise) for place, rise in enumerate(of)))


def test_a_failure_of_a_part_of_the_data_spares_some_batches_and_begins_with_the_first_that_it_does_not_spare() -> None:
    assert rises(1.5, 1.2, 0.0, 0.0, 0.0, 1.5) == {"abrupt", "intermittent", "outputs_unchanged", "weights_steady"}
    assert "intermittent" in rises(0.4, 0.3, 0.0, 1.5, 0.0, 1.0)
    assert "intermittent" not in rises(1.5, 1.2, 1.5, 0.8)


def test_what_is_raised_by_chance_before_a_failure_is_not_its_beginning() -> None:
    assert rises(0.12, 0.0, 0.0, 1.5, 1.5) == {"abrupt", "outputs_unchanged", "weights_steady"}


def test_only_the_first_step_tells_whether_the_model_was_sure() -> None:
    """From the second one on it has learned from the wrong targets."""
    found = after(step(100, rise=1.5), step(101, rise=1.5, sure=2.0), step(102, rise=1.5, sure=2.5))
    assert "outputs_unchanged" in found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"image_mean": 2.0}, {"inputs_changed"}),
        ({"image_deviation": 3.0}, {"inputs_changed"}),
        ({"projector_rms": 1.4}, {"inputs_changed"}),
        ({"counts": {**COUNTS, "positions": 1_000}}, {"inputs_changed"}),
        ({"counts": {**COUNTS, "labelled": 300, "positions": 1_004}}, {"targets_changed"}),
        ({"counts": {**COUNTS, "labels_masked": ROWS}}, {"all_masked"}),
        ({"gradient_norm": 30.0}, {"gradient_up"}),
    ],
)
def test_what_the_model_reads_or_computes_has_changed(changes: dict[str, Any], expected: set[str]) -> None:
    found = after(*(step(number, rise=1.5, sure=2.0, **changes) for number in (100, 101, 102)))
    assert found == {"abrupt", "outputs_changed", "weights_steady", *expected}


def test_one_batch_may_be_made_of_rare_samples() -> None:
    strange: dict[str, Any] = {"counts": {**COUNTS, "labelled": 300, "positions": 1_500}}
    assert not after(step(100, rise=1.5, **strange), step(101, rise=1.5)) & {"targets_changed", "inputs_changed"}


def test_targets_that_cost_other_than_usual_by_counting_are_others() -> None:
    views = [step(number, rise=1.5) for number in (100, 101)]
    for view in views:
        view.target_cost = 4.0
    assert "targets_changed" in after(*views)


def test_weights_that_were_moved_from_outside() -> None:
    view = step(100, rise=3.0, sure=2.0)
    view.weights_moved = 50.0
    assert after(view, step(101, rise=3.0, sure=2.0)) >= {"weights_moved", "outputs_changed"}


@pytest.mark.parametrize("size", [0.1, 3.0])
def test_updates_of_another_size_come_before_the_loss_rises(size: float) -> None:
    views = [step(number, rise=max(0.0, 0.05 * (number - 104))) for number in range(100, 112)]
    for view in views:
        view.update_size = size
    found = after(*views)
    assert found >= {"updates_changed", "gradual"}


@pytest.mark.parametrize(("slope", "expected"), [(0.03, "gradual"), (2.0, "abrupt")])
def test_a_rise_is_there_at_once_or_step_by_step(slope: float, expected: str) -> None:
    assert expected in after(*(step(100 + number, rise=min(2.0, slope * (1 + number))) for number in range(12)))


def test_a_raised_rate_is_told_and_a_warm_up_is_none() -> None:
    assert "rate_raised" in after(step(100, rates=np.array([3e-2])))
    facts = OnsetFacts()
    for number in range(400):
        facts.take(step(number, rates=np.array([1e-6 * (number + 1)])))
        assert "rate_raised" not in facts.around(number)


@pytest.mark.parametrize(("again", "growth", "expected"), [(1e-3, 0.0, 1), (3e-3, 0.0, 0), (0.0, 0.03, 0)])
def test_a_rate_that_has_been_there_is_a_restart(again: float, growth: float, expected: int) -> None:
    facts, restarts = OnsetFacts(), 0
    for number in range(300):
        rate = 1e-3 * max(0.01, 1.0 - number / 150) if number < 150 else again or 1e-3 * 1.0
        if growth:
            rate = 1e-3 * (1.0 + growth) ** max(0, number - 150)
        facts.take(step(number, rates=np.array([rate])))
        restarts += facts.has_restarted
    assert restarts == expected


def test_what_nobody_sent_is_not_told_of() -> None:
    facts = OnsetFacts()
    for number in range(60):
        facts.take(StepView(StepRecord(step=number, loss=0.5 if number < 50 else 5.0)))
    assert facts.around(50) == {"abrupt"}


def test_its_state_goes_on_bit_for_bit() -> None:
    facts, kept = learned(), OnsetFacts()
    kept.restore(facts.state())
    for number in range(100, 104):
        for each in (facts, kept):
            each.take(step(number, rise=2.0))
    assert kept.state() == facts.state()
    assert kept.around(102) == facts.around(102)
    kept.restore([[], [0, 0.0, 0.0], [0, 0.0, 0.0], []])  # a state of another version: a few steps bring facts back
    assert kept.around(102) == facts.around(102)


def test_every_fact_has_its_words() -> None:
    assert all(FACTS.values())
