"""What people do on purpose, and what looks like a failure to a rule that does not know of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.detector_traces import Drawn, Failure, Task, Told, trace, watched

TASK = Task(batch=32)
TEXT = 8
"""Steps of text, in blocks."""


def found(told: Told, name: str) -> list[int]:
    return [step for step, opened in told.openings if opened == name]


def shown(drawn: Drawn, distinct: int, blank: int = 0) -> None:
    """Let so many of a step's images differ, and so many of them be of one colour, which are alike."""
    number = drawn.task.batch
    rng = np.random.default_rng([drawn.step, 3])
    hashes = rng.integers(1, 2**62, distinct)[np.arange(number) % distinct]
    hashes[:blank] = 77
    deviations = np.full(number, 0.25, np.float32)
    deviations[:blank] = 0.0
    drawn.changes |= {"image_hashes": hashes, "image_deviations": deviations}


def blank_now_and_then(drawn: Drawn) -> None:
    is_blank = np.random.default_rng([drawn.step, 9]).random() < 0.15
    shown(drawn, 32, 32 if is_blank else 0)


IMAGES: dict[str, Failure] = {
    "many questions about each of two images": lambda drawn: shown(drawn, 2),
    "text has blank images": lambda drawn: shown(drawn, 32, 26),
    "a step in seven shows nothing": blank_now_and_then,
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_alike_by_design(name: str) -> None:
    assert watched(trace(TASK, 300, failure=IMAGES[name])).openings == []


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_lost_where_they_were_so_before(name: str) -> None:
    def lost(drawn: Drawn) -> None:
        IMAGES[name](drawn)
        if drawn.step >= 200:
            shown(drawn, 1, 32)

    told = watched(trace(TASK, 230, failure=lost))
    assert [opened for _, opened in told.openings] == ["image_constant"]
    assert 200 <= told.openings[0][0] <= 212


def test_one_image_of_each_micro_batch_for_all_of_its_samples() -> None:
    def first_alone(drawn: Drawn) -> None:
        shown(drawn, 4)
        drawn.counts["batches"] = 4

    assert watched(trace(TASK, 20, failure=first_alone)).openings == [(2, "image_constant")]


def test_steps_of_so_many_tokens_have_few_long_samples() -> None:
    def of_one_length(drawn: Drawn) -> None:
        is_long = np.random.default_rng([drawn.step, 5]).random() < 0.4
        drawn.changes["sample_hashes"] = drawn.rng.integers(1, 2**62, 5 if is_long else 32)

    assert found(watched(trace(replace(TASK, images=False), 400, failure=of_one_length)), "batch_shrunk") == []


def test_pieces_of_prose_end_nowhere() -> None:
    def prose_now_and_then(drawn: Drawn) -> None:
        if drawn.step % 25 == 24:
            drawn.counts |= {"answers_with_eos": 0, "positions": 96}

    assert found(watched(trace(TASK, 200, failure=prose_now_and_then)), "answers_truncated") == []


def test_data_that_are_nearly_all_of_one_answer() -> None:
    rare = Task(batch=24, options=2, prior=(0.985, 0.015))
    for seed in range(4):
        assert found(watched(trace(rare, 200, seed=seed)), "target_single") == []


def test_a_shard_of_harder_data_that_comes_again() -> None:
    def shards(drawn: Drawn) -> None:
        if drawn.step % 60 < TEXT:
            drawn.ids = np.concatenate([drawn.ids[:4] + 50, drawn.ids[4:]])
            content = drawn.probabilities[:, : drawn.task.length, : drawn.task.options]
            content[:] = 0.5 * content + 0.5 * content.mean(axis=-1, keepdims=True)

    told = watched(trace(Task(batch=32, learning_steps=40.0), 500, failure=shards))
    assert [(step, name) for step, name in told.openings if step > 120 and name in {"loss_cusum", "loss_spike"}] == []


class Walk:
    """Weights that an optimizer moves by about the rate."""

    def __init__(self, number: int = 16) -> None:
        self.weights = np.linspace(-0.1, 0.1, number)

    def move(self, drawn: Drawn, *, still: int = 0) -> None:
        """Take a step; the first few weights stand still."""
        moved = drawn.rate * np.clip(np.random.default_rng(drawn.step).normal(0.0, 0.3, self.weights.size), -1.0, 1.0)
        moved[:still] = 0.0
        self.weights = self.weights + moved
        drawn.changes["heartbeat"] = self.weights.astype(np.float32)


def test_an_outer_optimizer_moves_weights_from_time_to_time() -> None:
    walk = Walk()

    def outer(drawn: Drawn) -> None:
        if drawn.step % 30 == 29:
            walk.weights = walk.weights + 1e-3 * (4.0 if drawn.step < 80 else 7.0)
        walk.move(drawn)

    assert found(watched(trace(TASK, 300, failure=outer)), "weights_jump") == []


def test_steps_of_text_leave_what_sees_images_where_it_is() -> None:
    walk = Walk()

    def text(drawn: Drawn) -> None:
        is_text = drawn.step % 60 < TEXT
        walk.move(drawn, still=8 if is_text else 0)
        if is_text:
            nothing = np.zeros(0)
            drawn.changes |= {"image_hashes": nothing.astype(np.int64), "image_deviations": nothing.astype(np.float32)}
            drawn.changes |= {"projector_rms": -1.0, "projector_spread": -1.0}

    assert found(watched(trace(TASK, 300, failure=text)), "weights_frozen") == []


def test_next_to_no_rate_moves_nothing() -> None:
    walk = Walk()

    def ending(drawn: Drawn) -> None:
        drawn.rate = 1e-3 * (1.0 - drawn.step / 400) ** 4
        walk.move(drawn, still=8 if drawn.step > 350 else 0)

    assert found(watched(trace(TASK, 400, failure=ending)), "weights_frozen") == []


def test_a_rank_with_harder_data_all_along() -> None:
    def harder(drawn: Drawn) -> None:
        drawn.loss_shift[3] = 0.3 * (1.0 - np.exp(-drawn.step / 150.0)) * float(drawn.rng.random())

    assert found(watched(trace(Task(batch=32, ranks=4), 500, failure=harder)), "rank_outlier") == []


def weighed_against_frequency(drawn: Drawn) -> None:
    """Rare options weigh more in the loss: the best model for that gives them more than their frequency."""
    if drawn.step < 30:
        return  # it has not learned that yet
    content = drawn.probabilities[:, : drawn.task.length]
    content[..., :4] = 0.3 * content[..., :4] + 0.7 * content[..., :4].sum(-1, keepdims=True) / 4


def told_times(factor: float) -> Failure:
    def tell(drawn: Drawn) -> None:
        weighed_against_frequency(drawn)
        rows, places = np.indices(drawn.targets.shape)
        loss = -np.log(drawn.probabilities[rows, places, drawn.targets]).mean()
        drawn.changes["trainer_losses"] = np.array([factor * loss], np.float32)

    return tell


SKEWED = replace(TASK, prior=(0.94, 0.02, 0.02, 0.02), length=4, start_skill=0.3)


def test_another_loss_than_the_cross_entropy_gives_tokens_other_shares() -> None:
    assert watched(trace(SKEWED, 200, failure=told_times(1.4))).openings == []
    opened = [name for _, name in watched(trace(SKEWED, 200, failure=told_times(1.0))).openings]
    assert opened == ["mass_excess"]


def test_a_loss_that_weighs_the_frequent_more_is_told() -> None:
    """Nobody means to give to the frequent what is the rare ones'."""

    def to_the_frequent(drawn: Drawn) -> None:
        told_times(1.4)(drawn)
        if drawn.step >= 30:
            content = drawn.probabilities[:, : drawn.task.length]
            content[..., 0] += 0.9 * content[..., 1:4].sum(-1)
            content[..., 1:4] *= 0.1

    task = replace(SKEWED, prior=(0.55, 0.15, 0.15, 0.15))
    assert [name for _, name in watched(trace(task, 120, failure=to_the_frequent)).openings]


def test_a_collapse_under_another_loss_is_one() -> None:
    def collapsing(drawn: Drawn) -> None:
        told_times(1.4)(drawn)
        if drawn.step >= 120:
            content = drawn.probabilities[:, : drawn.task.length]
            content[:] = 0.1 * content
            content[..., 2] += 0.9

    told = watched(trace(SKEWED, 140, failure=collapsing))
    assert 120 <= told.openings[0][0] <= 132
