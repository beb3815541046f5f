from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sidestep.worker.detectors.loss_changes import LossChanges
from sidestep.worker.detectors.persistence import Persistence
from sidestep.worker.detectors.running import Cusum, Freeze, RunningMoments, Window, median
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

REAL_LOSSES = Path(__file__).parents[4] / "shared" / "data" / "modded_nanogpt_losses.npz"


def test_moments_follow_the_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.5, 4_000)
    moments = RunningMoments(rate=0.01, floor=0.0)
    for value in values:
        moments.update(float(value))
    assert moments.mean == pytest.approx(3.0, abs=0.1)
    assert moments.deviation == pytest.approx(0.5, rel=0.15)


def test_an_outlier_moves_them_by_no_more_than_a_large_ordinary_value() -> None:
    plain, hit = RunningMoments(rate=0.05, floor=0.1), RunningMoments(rate=0.05, floor=0.1)
    for value in np.random.default_rng(1).normal(0.0, 1.0, 100):
        plain.update(float(value))
        hit.update(float(value))
    hit.update(1e9)
    assert hit.mean - plain.mean <= 0.05 * 3.0 * plain.deviation + 0.05 * abs(plain.mean) + 1e-9


def test_the_floor_is_the_smallest_deviation() -> None:
    moments = RunningMoments(rate=0.01, floor=0.02)
    for _ in range(50):
        moments.update(0.002)
    assert moments.z(0.012) == pytest.approx(0.5)


def test_a_sum_takes_as_many_steps_as_its_clip_says() -> None:
    for clip, z, steps in ((6.0, 100.0, 2), (3.0, 100.0, 5), (3.0, 3.0, 5), (3.0, 2.0, 10), (3.0, 1.0, None)):
        cusum = Cusum(allowance=1.0, limit=9.9, clip=clip)
        reached = next((step for step in range(1, 100) if cusum.add(z) > 9.9), None)
        assert reached == steps
    for _ in range(1_000):
        cusum.add(50.0)
    assert cusum.total <= 3 * 9.9, "it comes down again in bounded time"


def test_one_large_step_is_suspicious_whatever_the_clip_and_two_ordinary_ones_are_not() -> None:
    cusum = Cusum(allowance=1.0, limit=9.9, clip=3.0)
    cusum.add(6.0)
    assert cusum.is_suspicious
    assert not cusum.is_beyond
    again = Cusum(allowance=1.0, limit=9.9, clip=3.0)
    again.restore(cusum.state())
    assert (again.is_suspicious, again.state()) == (True, cusum.state())
    again.restore(3.5)
    assert again.state() == [3.5, 3.5], "a state from before there were two sums"
    calm = Cusum(allowance=1.0, limit=9.9, clip=3.0)
    calm.add(2.5)
    calm.add(2.5)
    assert not calm.is_suspicious


def test_references_stand_still_for_a_bounded_time() -> None:
    freeze = Freeze(3)
    assert [freeze.holds(is_suspicious=True) for _ in range(5)] == [True, True, True, False, False]
    assert not freeze.holds(is_suspicious=False)
    assert freeze.holds(is_suspicious=True)


def test_a_robust_z_does_not_see_its_own_outliers() -> None:
    window = Window(32)
    for value in [0.0, 1.0] * 12 + [1_000.0] * 4:
        window.add(value)
    z = window.robust_z(10.0, floor=0.01)
    assert z is not None
    assert z > 5
    assert Window(8).robust_z(1.0, floor=0.1) is None
    assert median([3.0, 1.0, 2.0, 10.0]) == 2.5


def test_a_window_s_median_is_that_of_its_last_values() -> None:
    rng = np.random.default_rng(4)
    window = Window(21)
    values = [float(value) for value in rng.integers(0, 9, 200)]  # many ties
    for number, value in enumerate(values, start=1):
        window.add(value)
        assert window.values == values[max(0, number - 21) : number]
        assert window.median() == median(window.values)
    window.add(float("nan"))
    assert window.values == values[-21:], "no number is no value"
    kept = Window(21)
    kept.values = window.values
    assert kept.robust_z(20.0, 0.1) == window.robust_z(20.0, 0.1)


def judged(losses: list[float]) -> dict[str, list[int]]:
    """Steps at which each detector of the loss speaks."""
    settings = DetectorSettings()
    family = LossChanges(settings)
    kept: dict[str, Persistence] = {}
    found: dict[str, list[int]] = {}
    for step, loss in enumerate(losses):
        for reading in family.read(StepView(StepRecord(step=step, loss=loss))):
            rule = settings.rule(reading.name)
            assert rule is not None
            if kept.setdefault(reading.name, Persistence(rule)).take(step, reading) is not None:
                found.setdefault(reading.name, []).append(step)
    return found


def noisy(level: float, steps: int, seed: int = 0) -> list[float]:
    return [float(value) for value in level + np.random.default_rng(seed).normal(0.0, 0.12, steps)]


def test_a_step_a_ramp_and_a_spike_are_told_apart() -> None:
    step = judged(noisy(3.0, 400) + noisy(3.6, 60, seed=1))
    assert 400 <= step["loss_cusum"][0] <= 405
    ramp = judged([value + max(0.0, place - 300) * 0.004 for place, value in enumerate(noisy(3.0, 600))])
    assert "loss_regress" in ramp or "loss_cusum" in ramp
    spike = judged([*noisy(3.0, 300), 6.0, 5.0, 5.0, 5.0, 5.0, *noisy(3.0, 60, seed=2)])
    assert spike["loss_spike"] == [303]
    assert judged([*noisy(3.0, 300), 4.0, 6.0, 5.0, 3.8, *noisy(3.0, 60, seed=2)]) == {}, "an instability that passes"
    assert judged([*noisy(3.0, 300), 6.0, *noisy(3.0, 60, seed=2)]) == {}, "one batch is one batch"
    assert judged(noisy(3.0, 500)) == {}
    assert judged((np.array(noisy(0.0, 500)) * 0.01 + 0.002).tolist()) == {}, "memorised"


@pytest.mark.skipif(not REAL_LOSSES.exists(), reason="the real losses are not shipped with the project")
def test_nothing_is_said_of_real_runs() -> None:
    with np.load(REAL_LOSSES) as runs:
        for name in sorted(runs.files)[::6]:
            spoken = judged([float(value) for value in runs[name][:4_000]])
            assert spoken == {}, name
