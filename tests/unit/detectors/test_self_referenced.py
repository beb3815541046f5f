"""Failures that show against the model's own past or the targets, and the healthy runs nearest to them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.support.detector_traces import (
    Drawn,
    Failure,
    Task,
    Told,
    changed,
    probe,
    relabelled,
    shuffled_targets,
    to_one_token,
    trace,
    watched,
)

from sidestep.protocol.messages import Kind
from sidestep.protocol.metric_names import COLLAPSE_LINE
from sidestep.worker.records import Part
from sidestep.worker.watch import Watch

ONSET = 260
CHOICE = Task(prior=(0.4, 0.3, 0.2, 0.1))
SLOW = Task(prior=(0.4, 0.3, 0.2, 0.1), learning_steps=1_500.0)
WORDS = Task(options=20, length=3)
RANKS = Task(options=4, ranks=4, batch=48)
SKEWED = Task(prior=(0.85, 0.05, 0.05, 0.05))


@cache
def learned(task: Task) -> Any:
    """State of a watch after ``ONSET`` healthy steps, during which it had nothing to say."""
    watch = Watch()
    assert watched(trace(task, ONSET), watch).lines == []
    return watch.state()


def failing(task: Task, failure: Failure | None, steps: int = 60, watch: Watch | None = None) -> Told:
    watch = watch or Watch()
    watch.restore(learned(task))
    return watched(trace(task, steps, failure=failure, onset=ONSET, first=ONSET), watch)


def scaled(factor: float) -> Failure:
    """Logits times a factor: the model is surer, or less sure, than it is right."""

    def fail(drawn: Drawn) -> None:
        powered = drawn.probabilities**factor
        drawn.probabilities[:] = powered / powered.sum(-1, keepdims=True)

    return fail


def to_prior(drawn: Drawn) -> None:
    """Calibrated, and blind: every question gets the mean answer."""
    content = drawn.probabilities[:, : drawn.task.length]
    content[:] = content.mean((0, 1), keepdims=True)


def copying(drawn: Drawn) -> None:
    for place in range(1, drawn.task.length):
        drawn.probabilities[:, place] *= 0.05
        answers = np.arange(drawn.targets.shape[0])
        drawn.probabilities[answers, place, drawn.targets[:, place - 1]] += 0.95


def forgetting(drawn: Drawn) -> None:
    """The second option gets nothing any more: what was its goes to the first."""
    content = drawn.probabilities[:, : drawn.task.length]
    content[..., 0] += 0.98 * content[..., 1]
    content[..., 1] *= 0.02


def two_tokens(drawn: Drawn) -> None:
    content = drawn.probabilities[:, : drawn.task.length]
    content *= 0.1
    content[..., 2:4] += 0.45


def one_rank(drawn: Drawn) -> None:
    drawn.loss_shift[2] = 0.5


def leaking(drawn: Drawn) -> None:
    rows, places = np.indices(drawn.targets.shape)
    drawn.probabilities *= 0.02
    drawn.probabilities[rows, places, drawn.targets] += 0.98


def becoming_one_answer(drawn: Drawn) -> None:
    """The data turn to one answer, and the model learns it within some twenty steps."""
    relabelled()(drawn)
    to_one_token(1.0 - float(np.exp(-(drawn.step - ONSET) / 12.0)))(drawn)


def exploding(drawn: Drawn) -> None:
    changed(gradient_norm=np.array([40.0], np.float32))(drawn)


def one_module_exploding(drawn: Drawn) -> None:
    changed(module_norms=np.array([0.2, 30.0, 1.0], np.float32))(drawn)


FAILURES: dict[str, tuple[Task, Failure, str, int]] = {
    "one token to everything": (CHOICE, to_one_token(0.9), "mass_excess", 12),
    "two tokens": (CHOICE, two_tokens, "mass_excess", 12),
    "a class forgotten": (CHOICE, forgetting, "mass_deficit", 20),
    "the token before, again": (WORDS, copying, "copying", 12),
    "shuffled answers": (CHOICE, shuffled_targets, "cal_up", 6),
    "fallen back to the prior": (CHOICE, to_prior, "back_to_prior", 15),
    "surer than right": (SLOW, scaled(4.0), "confidence_gap", 10),
    "one rank": (RANKS, one_rank, "rank_outlier", 14),
    "the answer in the prompt": (WORDS, leaking, "cal_down", 5),
    "one answer in the data": (CHOICE, becoming_one_answer, "target_single", 12),
    "a gradient that explodes": (SLOW, exploding, "grad_spike", 5),
    "one module's gradient": (SLOW, one_module_exploding, "module_spike", 3),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_found_in_time(kind: str) -> None:
    task, failure, name, delay = FAILURES[kind]
    watch = Watch()
    told = failing(task, failure, steps=28, watch=watch)
    (incident,) = watch.state()["incidents"]["open"]
    spoke = {each["detector"]: each["step"] for each in incident["evidence"]}
    assert ONSET <= spoke[name] <= ONSET + delay, spoke
    assert told.lines[0][0] <= spoke[name]


PRETRAINED = Task(prior=(0.4, 0.3, 0.2, 0.1), start_skill=0.9)


def test_a_pretrained_model_that_only_gets_worse_is_found_within_ten_steps() -> None:
    def worse(drawn: Drawn) -> None:
        if drawn.step >= 2:
            shuffled_targets(drawn)

    told = watched(trace(PRETRAINED, 14, failure=worse))
    assert [name for _, name in told.openings] == ["worse_than_start"]
    assert told.openings[0][0] <= 10
    assert "the learning rate is too high for the weights that it began with" in told.blocks


def test_two_hard_batches_at_the_start_are_no_worse_start() -> None:
    def hard(drawn: Drawn) -> None:
        if drawn.step in {1, 2}:
            shuffled_targets(drawn)

    assert watched(trace(PRETRAINED, 60, failure=hard)).openings == []


def test_the_user_s_story_when_the_model_is_to_blame() -> None:
    told = failing(CHOICE, to_one_token(0.95))
    lines = [line for _, line in told.lines if line == COLLAPSE_LINE.format(reason="mass_excess")]
    assert len(lines) == 1, "said once"
    assert "'t10' is " in told.blocks, "the token is named"
    assert "training data have become one answer" not in told.blocks


def test_the_user_s_story_when_the_data_are_to_blame() -> None:
    told = failing(CHOICE, becoming_one_answer, steps=80)
    assert sum(line.startswith(COLLAPSE_LINE.format(reason="")) for _, line in told.lines) == 1
    said = "\n".join([told.blocks, *(line for _, line in told.lines)])
    assert "the training data have become one answer: all targets are the same token" in said


def test_the_user_s_story_when_the_data_were_so_from_the_start() -> None:
    told = watched(trace(Task(prior=(1.0, 0.0, 0.0, 0.0), start_skill=0.5), 40))
    assert COLLAPSE_LINE.format(reason="single_answer") in [line for _, line in told.lines]
    assert "the training data have become one answer" in told.blocks


@pytest.mark.parametrize(
    "task",
    [
        SKEWED,
        replace(SKEWED, learning_steps=1_500.0),
        Task(options=3, prior=(0.95, 0.03, 0.02)),
        Task(options=2, prior=(0.6, 0.4)),
        Task(final_loss=1e-3, learning_steps=30.0),
        Task(options=12, batch=8),
        Task(options=150, length=24, batch=8, images=False),
        Task(start_skill=0.8),
    ],
    ids=["85 % A", "85 % A, learned late", "95 % A", "yes or no", "memorised", "eight answers", "text", "warm start"],
)
def test_nothing_is_said_of_data_that_are_so(task: Task) -> None:
    assert watched(trace(task, 300, seed=3)).lines == []


def test_an_instability_that_passes_within_three_steps_is_none() -> None:
    def passing(drawn: Drawn) -> None:
        if drawn.step < ONSET + 3:
            shuffled_targets(drawn)
            exploding(drawn)

    assert failing(CHOICE, passing).lines == []


def test_other_data_are_news_and_announced_ones_are_none() -> None:
    def switch(drawn: Drawn) -> None:
        drawn.ids = drawn.ids + np.array([100] * 4 + [0, 0])

    told = failing(SLOW, switch)
    assert "evidence: target_shift:" in told.blocks

    def announced(drawn: Drawn) -> None:
        switch(drawn)
        drawn.stage = "second" if drawn.step == ONSET else ""

    assert failing(SLOW, announced).lines == []


def test_exact_checks_speak_through_an_announced_stage() -> None:
    def fail(drawn: Drawn) -> None:
        drawn.stage = "second" if drawn.step == ONSET else ""
        changed(gradient_norm=np.array([np.nan], np.float32))(drawn)

    assert failing(CHOICE, fail, steps=3).openings == [(ONSET, "nonfinite")]


def with_probes(gains: dict[int, float], steps: int, task: Task = Task(batch=8)) -> Told:  # noqa: B008
    watch = Watch()
    found = []
    for step in trace(task, steps):
        gain = gains.get(step.step)
        parts = {
            **step.parts,
            **({Kind.PROBE: (Part(rank=0, message=probe(step.step, gain)),)} if gain is not None else {}),
        }
        found.append(replace(step, parts=parts))
    return watched(found, watch)


def test_images_that_were_never_looked_at_are_found_at_the_sixth_probe() -> None:
    told = with_probes({step: 0.01 * (-1) ** step for step in range(0, 640, 80)}, 430)
    assert told.openings == [(5 * 80, "image_unused")]


def test_a_model_that_has_learned_nothing_yet_is_not_called_blind() -> None:
    gains = dict.fromkeys(range(0, 480, 60), 1e-6)
    assert with_probes(gains, 430, Task(batch=8, learning_steps=1e9)).openings == []


def test_images_that_come_into_use_late_are_not() -> None:
    assert with_probes({step: 0.3 if step >= 300 else 1e-6 for step in range(0, 480, 60)}, 450).openings == []


def test_images_that_were_looked_at_and_are_no_more_are_found_at_the_second_probe() -> None:
    told = with_probes({step: 0.5 if step < 200 else 1e-6 for step in range(0, 300, 20)}, 260)
    assert told.openings[0] == (220, "image_lost")


def test_without_logits_the_loss_alone_is_judged() -> None:
    def fused(drawn: Drawn) -> None:
        empty = np.zeros(0, np.int32)
        loss = 1.0 + 0.01 * float(np.sin(drawn.step)) + (1.0 if drawn.step >= 100 else 0.0)
        changed(
            targets=empty, predictions=empty, losses=empty.astype(np.float16), entropies=empty.astype(np.float16),
            eos_probabilities=empty.astype(np.float16), places=empty.astype(np.uint8), mean_ids=empty, vocabulary=0,
            mean_probabilities=empty.astype(np.float32), labelled=0, trainer_losses=np.array([loss], np.float32),
        )(drawn)  # fmt: skip

    told = watched(trace(CHOICE, 110, failure=fused))
    assert told.lines[0][0] in {103, 104}
    assert set(told.verdicts[90].readings) & {"loss_cusum", "cal_up", "mass_excess"} == {"loss_cusum"}


def test_a_pretrained_model_that_favours_another_format_at_first_is_healthy() -> None:
    """For the 90 steps of a warm-up it says the first option too often, and too surely."""

    def habit(drawn: Drawn) -> None:
        to_one_token(0.6 * max(0.0, 1.0 - drawn.step / 90.0))(drawn)

    assert watched(trace(replace(CHOICE, start_skill=0.7), 200, failure=habit)).lines == []


def test_bursts_of_what_is_nearly_memorised_are_no_failure() -> None:
    def burst(drawn: Drawn) -> None:
        if drawn.step % 20 > 16:
            changed(gradient_norm=np.array([30.0], np.float32))(drawn)

    assert watched(trace(Task(final_loss=1e-3, learning_steps=30.0), 200, failure=burst)).lines == []


@pytest.mark.parametrize(("factor", "expected"), [(1.0, False), (10.0, True)])
def test_a_loss_that_rises_as_a_rate_comes_back_up_is_a_restart_and_one_beyond_is_not(
    factor: float, expected: bool
) -> None:
    """A cosine from 1e-3 down to 1e-5, and up again; the loss then lies where it lay at that rate."""

    def fail(drawn: Drawn) -> None:
        place = drawn.step % 240 / 240
        drawn.rate = 1e-5 + 1e-3 * (0.5 + 0.5 * float(np.cos(place * np.pi))) * (factor if drawn.step >= 240 else 1.0)
        if 240 <= drawn.step < 290:
            to_one_token(0.4)(drawn)

    told = watched(trace(Task(start_skill=0.9), 320, failure=fail))
    assert any(name in {"cal_up", "loss_cusum"} for _, name in told.openings) is expected, told.openings
