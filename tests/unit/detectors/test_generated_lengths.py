"""Generated answers that are longer or shorter than their targets, and those of a stage whose samples are older."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.detector_traces import context

from sidestep.worker.detectors.generation import TRAINED_STEPS, GeneratedAnswers
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.metrics.sequences import GeneratedSamples, TokenSequence
from sidestep.worker.step_record import StepRecord

NUM_SAMPLES, MAX_NEW_TOKENS = 8, 64


def trained_on(length: int, answers: int = 12) -> StepView:
    """A step of answers with so many tokens and an end."""
    places = np.tile(np.arange(length + 1, dtype=np.uint8), answers)
    targets = np.arange(places.size, dtype=np.int32)
    return StepView(StepRecord(places=places, targets=targets, losses=np.zeros(places.size, np.float16)))


def generated(length: int, *, targets: int, has_ended: bool = True) -> StepView:
    samples = {"samples": [{"target_ids": list(range(10, 10 + targets))}] * NUM_SAMPLES}
    sequence = TokenSequence(content=tuple(range(10, 10 + length)), has_ended=has_ended)
    made = GeneratedSamples(
        samples=tuple(range(NUM_SAMPLES)), sequences=(sequence,) * NUM_SAMPLES, max_new_tokens=MAX_NEW_TOKENS
    )
    return StepView(StepRecord(), context(samples=samples), made)


def read(family: GeneratedAnswers, view: StepView) -> Reading:
    (found,) = [each for each in family.read(view) if each.name == "gen_length"]
    return found


def after(length: int, steps: int = TRAINED_STEPS, *, in_first_stage: bool = False) -> GeneratedAnswers:
    family = GeneratedAnswers(DetectorSettings())
    if not in_first_stage:
        family.forget()
    for _ in range(steps):
        assert not family.read(trained_on(length))
    return family


@pytest.mark.parametrize("in_first_stage", [True, False])
def test_answers_that_are_unlike_their_targets_and_the_training_are_told(in_first_stage: bool) -> None:
    for length in (0, 40):
        assert read(after(6, in_first_stage=in_first_stage), generated(length, targets=6)).is_beyond
    assert not read(after(6, in_first_stage=in_first_stage), generated(8, targets=6)).is_beyond
    assert read(after(6, in_first_stage=in_first_stage), generated(6, targets=6, has_ended=False)).is_beyond


def test_answers_no_longer_than_those_of_an_announced_stage_are_learned() -> None:
    assert not read(after(18), generated(18, targets=3)).is_beyond
    assert read(after(18, in_first_stage=True), generated(18, targets=3)).is_beyond
    assert read(after(18, steps=4), generated(18, targets=3)).is_beyond, "too few steps to tell"
    assert read(after(18), generated(2, targets=18)).is_beyond


def test_another_stage_and_a_restart() -> None:
    family = after(18)
    again = GeneratedAnswers(DetectorSettings())
    again.restore(family.state())
    assert not read(again, generated(18, targets=3)).is_beyond
    family.forget()
    assert read(family, generated(18, targets=3)).is_beyond
