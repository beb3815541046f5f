"""What is wrong for as long as it lasts: pixels on another scale, a spent schedule, a model that is never sure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.support.detector_traces import Drawn, Failure, Task, Told, changed, trace, watched

from sidestep.worker.detectors.settings import DetectorSettings, apply_assignments
from sidestep.worker.watch import Watch

TASK = Task(batch=32)
ONSET = 60


def pixels(deviation: float, mean: float = 0.0) -> Failure:
    return changed(image_deviations=np.full(32, deviation, np.float32), image_means=np.full(32, mean, np.float32))


def found(told: Told, name: str) -> list[int]:
    return [step for step, opened in told.openings if opened == name]


@pytest.mark.parametrize(
    "failure", [pixels(64.0), pixels(0.001), pixels(0.6), pixels(0.1), pixels(0.25, 0.6), pixels(0.25, -0.8)],
    ids=["bytes", "divided twice", "2.4 times", "0.4 times", "lighter", "darker"],
)  # fmt: skip
def test_pixels_on_another_scale_are_found_within_five_steps(failure: Failure) -> None:
    usual = pixels(0.25)
    told = watched(trace(TASK, ONSET + 12, failure=lambda drawn: (failure if drawn.step >= ONSET else usual)(drawn)))
    assert ONSET <= found(told, "image_scale")[0] <= ONSET + 5
    assert "pixels are on another scale" in told.blocks


@pytest.mark.parametrize(("deviation", "expected"), [(64.0, 1), (0.003, 1), (0.2, 0), (1.1, 0), (4.0, 0)])
def test_from_the_start_only_what_no_preprocessing_gives_is_told(deviation: float, expected: int) -> None:
    told = watched(trace(TASK, 30, failure=pixels(deviation)))
    assert len(found(told, "image_scale")) == expected


def test_images_that_vary_are_sound() -> None:
    def varied(drawn: Drawn) -> None:
        rng = np.random.default_rng(drawn.step)
        drawn.changes["image_deviations"] = rng.uniform(0.1, 1.5, 32).astype(np.float32)
        drawn.changes["image_means"] = rng.normal(0.0, 0.5, 32).astype(np.float32)

    assert not watched(trace(TASK, 200, failure=varied)).openings


def test_images_of_two_kinds_that_take_turns_are_sound() -> None:
    def of_two_kinds(drawn: Drawn) -> None:
        is_dark = np.random.default_rng([drawn.step, 3]).random() < 0.3
        pixels(0.05 if is_dark else 0.25, -0.9 if is_dark else 0.0)(drawn)

    assert not found(watched(trace(TASK, 400, failure=of_two_kinds)), "image_scale")


@pytest.mark.parametrize("warmup", ["0", "3"])
def test_a_warm_up_shorter_than_what_is_left_out_is_no_fault(warmup: str) -> None:
    settings = apply_assignments(DetectorSettings(), [f"detectors.image_scale.warmup={warmup}"])
    told = watched(trace(TASK, 30, failure=pixels(0.25)), Watch(settings))
    assert not found(told, "image_scale")


def without_images(drawn: Drawn) -> None:
    none = np.zeros(0, np.int64)
    drawn.changes.update(image_hashes=none, image_deviations=none.astype(np.float32))
    drawn.changes.update(projector_rms=-1.0, projector_spread=-1.0)


SAMPLES = {"samples": [{"image": {"shape": [1, 1, 1], "pixels": b"0"}}] * 4}


def test_images_that_stop_coming_are_told_after_thirty_steps() -> None:
    told = watched(trace(TASK, ONSET + 40, failure=without_images, onset=ONSET))
    assert found(told, "images_missing") == [ONSET + 29]
    assert "images are dropped" in told.blocks


@pytest.mark.parametrize(("samples", "expected"), [(SAMPLES, [29]), ({}, []), ({"samples": [{"image": None}] * 4}, [])])
def test_images_that_never_came_are_told_where_the_samples_have_some(
    samples: dict[str, Any], expected: list[int]
) -> None:
    assert found(watched(trace(TASK, 60, failure=without_images), samples=samples), "images_missing") == expected


def test_an_announced_stage_of_text_is_none() -> None:
    def text(drawn: Drawn) -> None:
        drawn.stage = "text" if drawn.step == ONSET else ""
        without_images(drawn)

    assert not found(watched(trace(TASK, ONSET + 160, failure=text, onset=ONSET), samples=SAMPLES), "images_missing")


def test_text_only_steps_between_others_are_a_mixture() -> None:
    def mixed(drawn: Drawn) -> None:
        if drawn.step % 30 > 10:
            without_images(drawn)

    assert not found(watched(trace(TASK, 300, failure=mixed), samples=SAMPLES), "images_missing")


def schedule(drawn: Drawn, length: int) -> None:
    drawn.rate = 1e-3 * max(0.0, 0.5 + 0.5 * float(np.cos(min(1.0, drawn.step / length) * np.pi)))


def test_a_schedule_that_ends_in_a_quarter_of_the_training_is_told() -> None:
    told = watched(trace(TASK, 400, failure=lambda drawn: schedule(drawn, 100)))
    assert [name for _, name in told.openings] == ["lr_spent"]
    assert 190 <= found(told, "lr_spent")[0] <= 210
    assert "the schedule was made for fewer steps" in told.blocks


def test_a_cosine_down_to_zero_is_a_schedule() -> None:
    assert not watched(trace(TASK, 400, failure=lambda drawn: schedule(drawn, 400))).openings


@pytest.mark.parametrize(
    ("share", "is_told"),
    [
        (lambda part: 1e-3**part, False),  # an exponential: the last third is under a hundredth
        (lambda part: (1.0 - part) ** 4, False),
        (lambda part: 1e-3 ** (5 * part), True),  # four times too fast: it falls for ever
        (lambda part: max(1e-3 ** (2 * part), 1e-3), True),  # it stands from half of the run on
    ],
)
def test_a_schedule_that_still_falls_has_not_ended(share: Callable[[float], float], is_told: bool) -> None:
    def schedule_of(drawn: Drawn) -> None:
        drawn.rate = 1e-3 * share(drawn.step / 600)

    told = watched(trace(TASK, 600, failure=schedule_of))
    assert [name for _, name in told.openings] == ["lr_spent"] * is_told


def flattened(excess: float) -> Failure:
    """The model is ``excess`` nats less sure than it is right."""

    def fail(drawn: Drawn) -> None:
        flat = drawn.probabilities.reshape(-1, drawn.probabilities.shape[-1])
        entropies = -(flat * np.log(np.maximum(flat, 1e-12))).sum(-1)
        losses = -np.log(np.maximum(flat[np.arange(drawn.targets.size), drawn.targets.reshape(-1)], 1e-12))
        lifted = entropies + float(losses.mean() - entropies.mean()) + excess
        drawn.changes["entropies"] = np.maximum(lifted, 0.0).astype(np.float16)

    return fail


def test_a_model_that_is_far_less_sure_than_right_is_told_once_it_has_learned() -> None:
    told = watched(trace(TASK, 160, failure=flattened(2.5)))
    assert [name for _, name in told.openings] == ["underconfident"]
    assert 100 <= found(told, "underconfident")[0] <= 110
    assert "smoothed far too much" in told.blocks


def test_smoothing_of_a_tenth_is_none() -> None:
    assert not found(watched(trace(TASK, 160, failure=flattened(1.4))), "underconfident")
