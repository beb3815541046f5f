"""Settings of the optimizer that cannot be meant, that change, and gradients that are thrown away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.detector_traces import Drawn, Failure, Task, Told, trace, watched

from sidestep.worker.watch import Watch

TASK = Task(batch=8, images=False)
NAN = float("nan")
ADAM = (0.9, 0.95, 1e-8, 0.01)
OURS = frozenset({"optimizer_settings", "settings_changed", "gradients_lost"})

Settings = tuple[float, float, float, float]


def telling(at: Callable[[int], list[Settings]], rate: float = 1e-3) -> Failure:
    """Every step tells the groups' settings at it."""

    def fail(drawn: Drawn) -> None:
        groups = at(drawn.step)
        drawn.rate = rate
        drawn.changes["rates"] = np.full(len(groups), rate)
        drawn.changes["group_settings"] = np.array(groups, np.float32).reshape(-1)

    return fail


def always(*groups: Settings) -> Callable[[int], list[Settings]]:
    return lambda _: list(groups)


def run(failure: Failure, *, steps: int = 60, **changes: Any) -> Told:
    return watched(trace(TASK, steps, failure=failure), **changes)


def opened(told: Told) -> list[tuple[int, str]]:
    return [each for each in told.openings if each[1] in OURS]


HEALTHY: Mapping[str, tuple[Settings, float]] = {
    "AdamW": (ADAM, 1e-3),
    "equal betas": ((0.95, 0.95, 1e-8, 0.1), 3e-3),
    "no momentum": ((0.0, 0.9, 1e-8, 0.0), 1e-3),
    "Lion": ((0.9, 0.99, NAN, 1.0), 1e-4),
    "SGD": ((0.9, NAN, NAN, 5e-4), 0.1),
    "SGD with a long momentum": ((0.999, NAN, NAN, 1e-4), 0.01),
    "a beta2 of 0": ((0.95, 0.0, 1e-8, 0.0), 1e-3),
    "nothing known": ((NAN, NAN, NAN, NAN), 1e-3),
    "strong decay": ((0.9, 0.999, 1e-8, 0.3), 3e-3),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_settings_that_people_train_with_are_not_spoken_of(name: str) -> None:
    settings, rate = HEALTHY[name]
    assert run(telling(always(settings, settings), rate)).openings == []


WRONG: Mapping[str, tuple[list[Settings], float, str]] = {
    "betas swapped": (
        [(0.999, 0.9, 1e-8, 0.0)] * 2, 1e-3, "beta1 (0.999) is above beta2 (0.9): the betas may be swapped"
    ),
    "betas swapped in a group": ([ADAM, (0.95, 0.9, 1e-8, 0.0)], 1e-3, "beta1 (0.95) is above beta2 (0.9) in group 1:"),
    "beta1 of 1": ([(1.0, NAN, NAN, 0.0)], 0.1, "beta1 is 1"),
    "beta2 of 1": ([(0.9, 1.0, 1e-8, 0.0)], 1e-3, "beta2 is 1"),
    "beta1 below 0": ([(-0.9, 0.99, 1e-8, 0.0)], 1e-3, "beta1 is -0.9"),
    "eps below 0": ([(0.9, 0.99, -1e-8, 0.0)], 1e-3, "eps is -1e-08"),
    "a rate below 0": ([ADAM], -1e-3, "the learning rate is -0.001"),
    "decay below 0": ([(0.9, 0.99, 1e-8, -0.1)], 1e-3, "weight_decay is -0.1"),
    "an absurd decay": (
        [ADAM, (0.9, 0.95, 1e-8, 5.0), *[ADAM] * 3], 3e-3,
        "weight decay takes 1.50% of the weights at every step in group 1 (rate 0.003, weight_decay 5)",
    ),
    "an absurd decay of SGD": ([(0.9, NAN, NAN, 0.2)], 0.1, "weight decay takes 2.00% of the weights"),
    "an infinite decay": ([(0.9, 0.95, 1e-8, float("inf"))], 1e-3, "weight decay takes inf%"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be_meant_are_told_at_the_third_step(name: str) -> None:
    groups, rate, words = WRONG[name]
    told = run(telling(always(*groups), rate), steps=6)
    assert opened(told) == [(2, "optimizer_settings")]
    assert words in told.blocks
    assert "the optimizer's settings cannot be meant" in told.blocks
    assert "the optimizer's settings are not those that were meant" in told.blocks


def test_without_rates_the_decay_is_not_judged() -> None:
    def fail(drawn: Drawn) -> None:
        telling(always((0.9, 0.95, 1e-8, 50.0)))(drawn)
        drawn.changes["rates"] = np.zeros(0)

    assert run(fail, steps=10).openings == []


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [((0.9, 0.95, 0.01, 1e-8), True), ((0.9, 0.95, 0.01, 0.0), False), ((0.9, 0.95, 1e-8, 0.01), False),
     ((0.9, NAN, 0.01, 1e-8), False)],
)  # fmt: skip
def test_eps_and_weight_decay_in_each_other_s_place(settings: Settings, is_told: bool) -> None:
    told = run(telling(always(settings)), steps=10)
    assert opened(told) == ([(2, "optimizer_settings")] if is_told else [])
    assert ("eps (0.01) and weight_decay (1e-08) may be swapped" in told.blocks) == is_told


def table(num_elements: int, num_frozen: int = 0) -> dict[str, Any]:
    rows = [
        {"name": "a.w", "module": 0, "param": "w", "numel": num_elements, "trainable": True},
        {"name": "a.f", "module": 0, "param": "f", "numel": num_frozen, "trainable": False},
    ]
    return {"modules": ["a"], "parameters": rows}


EPS: Mapping[str, tuple[Settings, dict[str, Any], float, list[tuple[int, str]]]] = {
    "far over the gradient": ((0.9, 0.95, 1.0, 0.0), table(1_000_000), 1.0, [(21, "optimizer_settings")]),
    "a hundredth of that": ((0.9, 0.95, 0.005, 0.0), table(1_000_000), 1.0, []),
    "of frozen weights": ((0.9, 0.95, 0.5, 0.0), table(100, num_frozen=1_000_000), 1.0, []),
    "of a table that says nothing": ((0.9, 0.95, 1.0, 0.0), {"modules": [], "parameters": []}, 1.0, []),
    "of no Adam": ((0.9, NAN, 1.0, 0.0), table(1_000_000), 1.0, []),
    "of a task that is learned": ((0.9, 0.95, 1.0, 0.0), table(1_000_000), 0.01, []),
}


@pytest.mark.parametrize("name", EPS)
def test_an_eps_that_outweighs_the_gradient(name: str) -> None:
    settings, parameters, loss, expected = EPS[name]

    def fail(drawn: Drawn) -> None:
        telling(always(settings))(drawn)
        drawn.changes |= {"gradient_norm": np.array([1.0], np.float32), "module_norms": np.zeros(0, np.float32)}
        if loss < 1.0:  # without rows the trainer's own number is the step's
            drawn.changes |= {name: np.zeros(0, drawn_type) for name, drawn_type in ROW_FIELDS.items()}
            drawn.changes["trainer_losses"] = np.array([loss], np.float32)

    told = run(fail, steps=40, parameters=parameters)
    assert opened(told) == expected
    assert not expected or "eps (1) is over 10 times the gradient's elements" in told.blocks


ROW_FIELDS: Mapping[str, Any] = {
    "targets": np.int32, "predictions": np.int32, "losses": np.float16, "entropies": np.float16,
    "eos_probabilities": np.float16, "places": np.uint8, "answers": np.uint16, "mean_ids": np.int32,
    "mean_probabilities": np.float32,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ changes


def stepped(at: int, *after: Settings, before: Settings = ADAM) -> Callable[[int], list[Settings]]:
    """Settings that are others from a step on; the last of them stays."""
    return lambda step: [before if step < at else after[min(step - at, len(after) - 1)]] * 2


CHANGES: Mapping[str, tuple[Callable[[int], list[Settings]], list[tuple[int, str]], str]] = {
    "another decay": (
        stepped(40, (0.9, 0.95, 1e-8, 0.1)), [(44, "settings_changed")], "from 0.01 to 0.1, 4 steps ago"
    ),
    "a decay that is lost": (stepped(40, (0.9, 0.95, 1e-8, 0.0)), [(44, "settings_changed")], "from 0.01 to 0"),
    "another momentum": (stepped(50, (0.5, 0.95, 1e-8, 0.01)), [(54, "settings_changed")], "beta1 went from 0.9"),
    "a memory ten times as long": (
        stepped(50, (0.9, 0.9999, 1e-8, 0.01), before=(0.9, 0.999, 1e-8, 0.01)), [(54, "settings_changed")],
        "beta2 went from 0.999 to 0.9999",
    ),
    "all at once": (
        stepped(60, (0.8, 0.9, 1e-6, 0.01)), [(64, "settings_changed")], "beta2 went from 0.95 to 0.9, 4 steps ago; eps"
    ),
    "in one group": (
        lambda step: [ADAM, (0.9, 0.95, 1e-8, 0.0 if step < 40 else 0.2), ADAM], [(44, "settings_changed")],
        "weight_decay went from 0 to 0.2 in group 1,",
    ),
    "early": (stepped(20, (0.9, 0.95, 1e-8, 0.1)), [], ""),
    "by next to nothing": (stepped(40, (0.9, 0.95, 1e-8, 0.01005)), [], ""),
    "for two steps": (stepped(40, (0.9, 0.95, 1e-8, 0.1), (0.9, 0.95, 1e-8, 0.1), ADAM), [], ""),
    "a schedule from the start": (
        lambda step: [(0.9 + 0.05 * np.sin(step / 20), 0.99, 1e-8, 0.04 + 0.01 * step / 100)] * 2, [], ""
    ),
    "a schedule that begins": (
        lambda step: [(0.9, 0.95, 1e-8, 0.01 * (1.0 if step < 60 else 1.05 ** (step - 59)))], [], ""
    ),
    "one more group": (lambda step: [ADAM] * (2 if step < 50 else 3), [], ""),
    "known no more": (lambda step: [(0.9, 0.95, 1e-8, 0.01 if step < 50 else NAN)], [], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_once_is_told_and_a_schedule_is_not(name: str) -> None:
    at, expected, words = CHANGES[name]
    told = run(telling(at), steps=120)
    assert opened(told) == expected
    assert words in told.blocks


def test_a_setting_that_changes_every_epoch_is_told_once() -> None:
    told = run(telling(lambda step: [(0.9, 0.95, 1e-8, 0.01 * 2.0 ** (step // 150))]), steps=900)
    assert opened(told) == [(154, "settings_changed")]


def test_a_schedule_of_one_step_an_epoch_goes_on_by_parts() -> None:
    def decay(step: int) -> float:
        return 0.1 - 0.09 * 0.5 * (1 + math.cos(math.pi * (step // 40) / 10))

    assert opened(run(telling(lambda step: [(0.9, 0.95, 1e-8, decay(step))]), steps=400)) == []


def test_a_setting_that_goes_on_by_parts_is_on_a_schedule_when_it_leaps() -> None:
    told = run(telling(lambda step: [(0.9, 0.95, 1e-8, 0.01 * (1.0 + 0.2 * (step >= 40)) * 2.0 ** (step // 80))]))
    assert opened(told) == []


def test_an_announced_stage_may_have_other_settings() -> None:
    def fail(drawn: Drawn) -> None:
        telling(stepped(60, (0.5, 0.9, 1e-6, 0.1)))(drawn)
        drawn.stage = "another" if drawn.step == 60 else ""

    assert opened(run(fail, steps=120)) == []


@pytest.mark.parametrize(("decay", "expected"), [(0.01, []), (0.1, [(64, "settings_changed")])])
def test_a_resume_with_other_settings_is_told(decay: float, expected: list[tuple[int, str]]) -> None:
    watch = Watch()
    watched(trace(TASK, 80, failure=telling(always(ADAM))), watch)
    resumed = Watch()
    resumed.restore(watch.state())
    resumed.begin(1, 60)
    again = watched(trace(TASK, 30, failure=telling(always((0.9, 0.95, 1e-8, decay))), first=60), resumed)
    assert opened(again) == expected


# ------------------------------------------------------------------------------------------------ lost gradients


def accumulating(lost: Callable[[int], int], batches: int = 4) -> Failure:
    def fail(drawn: Drawn) -> None:
        drawn.counts["batches"] = batches
        drawn.changes["gradients_lost"] = lost(drawn.step)

    return fail


def test_gradients_that_are_thrown_away_are_told_at_the_third_step() -> None:
    told = run(accumulating(lambda step: 3 if step >= 1 else 0), steps=10)
    assert opened(told) == [(3, "gradients_lost")]
    assert "gradients are thrown away between micro-batches" in told.blocks
    assert "at 3 of the step's micro-batches" in told.blocks
    assert "zero_grad is called within the accumulation" in told.blocks


def test_two_steps_of_three_are_not_enough() -> None:
    assert run(accumulating(lambda step: int(step % 3 > 0)), steps=20).openings == []


def test_a_step_of_one_micro_batch_tells_nothing() -> None:
    def fail(drawn: Drawn) -> None:
        accumulating(lambda step: 3 if step % 4 else 0, 1 if drawn.step % 4 == 0 else 4)(drawn)

    assert opened(run(fail, steps=10)) == [(3, "gradients_lost")]


# ------------------------------------------------------------------------------------------------ its state


@pytest.mark.parametrize("at", [20, 39, 41, 45, 70])
def test_its_state_goes_on_bit_for_bit(at: int) -> None:
    def step(drawn: Drawn) -> None:
        telling(stepped(40, (0.9, 0.9, 1.0, 0.1)))(drawn)

    whole, first, second = Watch(), Watch(), Watch()
    told = watched(trace(TASK, 80, failure=step), whole, parameters=table(1_000_000))
    before = watched(trace(TASK, at, failure=step), first, parameters=table(1_000_000))
    second.restore(first.state())
    after = watched(trace(TASK, 80 - at, failure=step, first=at), second, parameters=table(1_000_000))
    assert second.state() == whole.state()
    assert before.openings + after.openings == told.openings
    assert [name for _, name in told.openings] == ["settings_changed"]


def test_a_state_of_before_has_nothing_of_it() -> None:
    watch = Watch()
    watched(trace(TASK, 50, failure=telling(always(ADAM))), watch)
    state: Any = watch.state()
    del state["families"]["optimizer_settings"], state["families"]["rows"]
    older = Watch()
    older.restore(state)
    told = watched(trace(TASK, 50, failure=telling(always((0.9, 0.95, 1e-8, 0.1))), first=50), older)
    assert told.openings == []


def test_settings_of_half_a_group_are_not_read() -> None:
    def fail(drawn: Drawn) -> None:
        values: NDArray[np.float32] = np.full(6, 2.0, np.float32)
        drawn.changes["group_settings"] = values

    assert run(fail, steps=10).openings == []
