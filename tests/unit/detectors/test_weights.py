"""Weights that somebody else than the optimizer changed, that stand, or that nobody holds; a state that was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support.detector_traces import MODULES, Drawn, Failure, Task, Told, trace, watched

from sidestep.worker.watch import Watch

TASK = Task(batch=32)
ONSET = 80
RATE = 1e-3


class Adam:
    """A walk of 16 weights and of three modules' norms, by about the rate a step."""

    def __init__(self, rate: Callable[[int], float] = lambda _: RATE, norms_every: int = 10) -> None:
        self.rate, self.norms_every = rate, norms_every
        self.weights = np.linspace(-0.1, 0.1, 16)
        self.norms = np.array([3.0, 1.0, 10.0])
        self.counted = 0

    def step(self, drawn: Drawn, **changes: Any) -> None:
        """Move on and send what the hooks would."""
        drawn.rate = self.rate(drawn.step)
        moved = drawn.rate * np.clip(np.random.default_rng(drawn.step).normal(0.0, 0.3, 16), -1.0, 1.0)
        self.weights = self.weights + moved
        self.norms = self.norms * (1.0 + 2.0 * drawn.rate * np.random.default_rng([drawn.step, 1]).random(3))
        self.counted += 1
        told: dict[str, Any] = {"heartbeat": self.weights, "optimizer_steps": np.array([float(self.counted)])}
        if drawn.step % self.norms_every == 0:
            told["weight_norms"] = self.norms
        for name, value in {**told, **changes}.items():
            is_array = name in {"heartbeat", "weight_norms"}
            drawn.changes[name] = np.asarray(value, np.float32) if is_array else value


def run(
    failure: Callable[[Adam, Drawn], None], *, onset: int = ONSET, steps: int = 140, adam: Adam | None = None
) -> Told:
    """Train in health, and from the onset on with the failure in the place of a sound step."""
    adam = adam or Adam()

    def step(drawn: Drawn) -> None:
        if drawn.step >= onset:
            failure(adam, drawn)
        else:
            adam.step(drawn)

    return watched(trace(TASK, steps, failure=step))


def found(told: Told, name: str) -> list[int]:
    return [step for step, opened in told.openings if opened == name]


def test_healthy_weights_are_never_spoken_of() -> None:
    def warm_up_and_restarts(step: int) -> float:
        return RATE * float(0.01 + min(1.0, step / 60) * (0.5 + 0.5 * np.cos(step % 100 / 100 * np.pi)))

    told = run(lambda adam, drawn: adam.step(drawn), steps=400, adam=Adam(warm_up_and_restarts))
    assert told.openings == []


def test_weights_in_half_precision_stand_still_more_and_more_as_the_rate_falls() -> None:
    def rounded(adam: Adam, drawn: Drawn) -> None:
        adam.step(drawn)
        coarse = adam.weights.astype(np.float32).view(np.uint32) >> 13 << 13
        drawn.changes["heartbeat"] = coarse.view(np.float32)

    told = run(rounded, onset=0, steps=600, adam=Adam(lambda step: RATE * 0.99 ** max(0, step - 100)))
    assert found(told, "weights_jump") == found(told, "weights_frozen") == []


def test_one_sampled_weight_that_was_overwritten_is_found_at_once() -> None:
    def corrupted(adam: Adam, drawn: Drawn) -> None:
        if drawn.step == ONSET:
            adam.weights[5] += 0.05
        adam.step(drawn)

    told = run(corrupted)
    assert found(told, "weights_jump") == [ONSET]
    assert "weights were changed by something else than the optimizer" in told.blocks


@pytest.mark.parametrize("what", ["rows overwritten", "most of a module frozen", "decay"])
def test_a_module_whose_norm_leaps_is_found_at_the_next_reading_and_named(what: str) -> None:
    def fail(adam: Adam, drawn: Drawn) -> None:
        if what == "decay":
            adam.norms *= np.array([0.99, 0.98, 0.99])
        elif drawn.step == ONSET + 3:
            adam.norms[1] *= {"rows overwritten": 1.3, "most of a module frozen": 0.2}[what]
        adam.step(drawn)

    told = run(fail)
    assert ONSET < found(told, "weights_jump")[0] <= ONSET + 10
    assert f"the norm of the weights of {MODULES[1]!r} went from" in told.blocks


def test_a_rate_that_is_raised_moves_weights_further_and_is_no_jump() -> None:
    told = run(lambda adam, drawn: adam.step(drawn), adam=Adam(lambda step: RATE * (30.0 if step >= ONSET else 1.0)))
    assert found(told, "weights_jump") == []


def test_weights_that_stop_moving_while_others_go_on() -> None:
    def frozen(adam: Adam, drawn: Drawn) -> None:
        before = adam.weights[:10].copy()
        adam.step(drawn)
        adam.weights[:10] = before
        drawn.changes["heartbeat"] = adam.weights.astype(np.float32)

    told = run(frozen)
    assert found(told, "weights_frozen") == [ONSET + 4]
    assert "62% of the sampled weights did not move" in told.blocks


@pytest.mark.parametrize(("moves", "expected"), [(False, ["not_in_optimizer"]), (True, [])])
def test_trainable_weights_of_no_group_are_told_where_no_other_optimizer_moves_them(
    moves: bool, expected: list[str]
) -> None:
    def ungrouped(adam: Adam, drawn: Drawn) -> None:
        before = adam.weights[12:].copy()
        adam.step(drawn, heartbeat_ungrouped=4)
        if not moves:
            adam.weights[12:] = before
            drawn.changes["heartbeat"] = adam.weights.astype(np.float32)

    told = run(ungrouped, onset=0, steps=40)
    assert [name for _, name in told.openings] == expected
    assert not expected or told.openings[0][0] <= 12


COUNTS: Mapping[str, Callable[[Adam, int], float]] = {
    "cleared once": lambda adam, step: adam.counted - ONSET if step >= ONSET else adam.counted,
    "cleared after every step": lambda adam, step: 1.0 if step >= ONSET else adam.counted,
    "cleared from the start": lambda adam, step: 1.0,  # noqa: ARG005
}


@pytest.mark.parametrize("kind", COUNTS)
def test_an_optimizer_that_forgets_its_state_is_found(kind: str) -> None:
    def forgetful(adam: Adam, drawn: Drawn) -> None:
        adam.step(drawn)
        drawn.changes["optimizer_steps"] = np.array([float(COUNTS[kind](adam, drawn.step))])

    told = run(forgetful, onset=0)
    assert found(told, "optimizer_reset") == [19 if "start" in kind else ONSET]
    assert "the optimizer's state was lost" in told.blocks


def test_a_count_of_none_at_all_is_no_count() -> None:
    def elsewhere(adam: Adam, drawn: Drawn) -> None:
        adam.step(drawn)
        drawn.changes["optimizer_steps"] = np.array([0.0])

    assert found(run(elsewhere, onset=0), "optimizer_reset") == []


def test_a_count_that_stands_still_for_want_of_a_gradient_is_none() -> None:
    def without_images(adam: Adam, drawn: Drawn) -> None:
        adam.counted -= drawn.step % 3 == 0
        adam.step(drawn)

    assert found(run(without_images, onset=0), "optimizer_reset") == []


@pytest.mark.parametrize(("counted_on", "expected"), [(True, []), (False, ["optimizer_reset"])])
def test_a_resume_brings_the_optimizers_state_or_not(counted_on: bool, expected: list[str]) -> None:
    watch, adam = Watch(), Adam()
    watched(trace(TASK, 100, failure=adam.step), watch)
    watch.begin(1, 60)
    adam.counted = 60 if counted_on else 0
    adam.weights = adam.weights + 0.5  # those of the checkpoint: no jump
    again = watched(trace(TASK, 40, failure=adam.step, first=60), watch)
    assert [name for _, name in again.openings] == expected


def test_its_state_goes_on_bit_for_bit() -> None:
    def steps() -> Failure:
        return Adam().step

    whole, first = Watch(), Watch()
    watched(trace(TASK, 100, failure=steps()), whole)
    adam = Adam()
    watched(trace(TASK, 60, failure=adam.step), first)
    second = Watch()
    second.restore(first.state())
    watched(trace(TASK, 40, failure=adam.step, first=60), second)
    assert second.state() == whole.state()


def test_other_weights_are_not_compared() -> None:
    def chosen_anew(adam: Adam, drawn: Drawn) -> None:
        adam.step(drawn, heartbeat_digest=6 + drawn.step)
        others: NDArray[np.float32] = np.random.default_rng(drawn.step).normal(size=16).astype(np.float32)
        drawn.changes["heartbeat"] = others

    assert run(chosen_anew).openings == []


def in_half(rate: float, steps: int = 60) -> Told:
    """Weights that are held in bfloat16 from the first step on, all but one not small: each update is rounded."""
    adam = Adam(rate=lambda _: rate)
    adam.weights = np.concatenate([np.linspace(0.05, 0.1, 15), [1e-3]])

    def step(drawn: Drawn) -> None:
        held = torch.tensor(adam.weights, dtype=torch.float32).to(torch.bfloat16)
        adam.weights = held.to(torch.float64).numpy()
        adam.step(drawn)
        adam.weights = torch.tensor(adam.weights, dtype=torch.float32).to(torch.bfloat16).to(torch.float64).numpy()
        drawn.changes["heartbeat"] = adam.weights.astype(np.float32)

    return watched(trace(TASK, steps, failure=step))


def test_updates_that_bfloat16_rounds_away_are_found_from_the_start() -> None:
    told = in_half(3e-5, steps=90)
    (step,) = found(told, "updates_rounded")
    assert step <= 70
    assert "keep the weights in float32" in told.blocks


class RoundedByChance(Adam):
    """Weights in bfloat16, rounded up or down by chance; one of them is large."""

    def __init__(self, rate: Callable[[int], float]) -> None:
        super().__init__(rate)
        self.weights = np.concatenate([np.linspace(0.05, 0.1, 63), [2.0]])

    def step(self, drawn: Drawn, **changes: Any) -> None:
        """Step, and round."""
        drawn.rate = self.rate(drawn.step)
        rng = np.random.default_rng(drawn.step)
        exact = (self.weights + drawn.rate * rng.choice([-1.0, 1.0], 64)).astype(np.float32).view(np.uint32)
        rounded = (exact + rng.integers(0, 1 << 16, 64, np.uint32)) >> 16 << 16
        self.weights = rounded.view(np.float32).astype(np.float64)
        drawn.changes |= {"heartbeat": self.weights.astype(np.float32), **changes}


def test_weights_that_are_rounded_by_chance_stand_still_most_of_the_time() -> None:
    def falling(step: int) -> float:
        return 1e-5 * max(0.05, min(1.0, (step + 1) / 20, (600 - step) / 300))

    for seed in range(3):
        told = watched(trace(TASK, 600, seed=seed, failure=RoundedByChance(falling).step))
        assert told.openings == []


def test_a_weight_in_bfloat16_that_was_overwritten_is_found_at_once() -> None:
    adam = RoundedByChance(lambda _: 1e-3)

    def overwritten(drawn: Drawn) -> None:
        if drawn.step == ONSET:
            adam.weights[3] = 0.5
        adam.step(drawn)

    told = watched(trace(TASK, 100, failure=overwritten))
    assert told.openings == [(ONSET, "weights_jump")]


@pytest.mark.parametrize("rate", [3e-3, 1e-3])
def test_updates_that_bfloat16_holds_are_well(rate: float) -> None:
    assert not found(in_half(rate), "updates_rounded")


def test_weights_in_float32_that_move_by_little_are_not_rounded() -> None:
    assert not found(run(Adam.step, onset=0, adam=Adam(rate=lambda _: 1e-9)), "updates_rounded")
