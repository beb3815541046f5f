"""Samples without a label or begun twice, labels that begin late, and answers that stand in another template."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tests.support.detector_traces import Drawn, Failure, Task, Told, trace, watched

from sidestep.protocol.signals import PROMPT_COUNTS
from sidestep.worker.watch import Watch

TASK = Task(batch=8, images=False)


def rows(
    total: Callable[[int], int], empty: Callable[[int], int] = lambda _: 0, twice: Callable[[int], int] = lambda _: 0
) -> Failure:
    """Every step has so many rows, so many of them without a label, so many that begin twice."""

    def fail(drawn: Drawn) -> None:
        drawn.counts["rows"] = total(drawn.step)
        drawn.counts["rows_without_labels"] = empty(drawn.step)
        drawn.counts["rows_begun_twice"] = twice(drawn.step)

    return fail


def run(failure: Failure, steps: int = 60) -> Told:
    return watched(trace(TASK, steps, failure=failure))


@pytest.mark.parametrize(
    ("total", "empty", "at"),
    [
        (24, lambda _: 6, 7),  # as soon as eight steps are there
        (4, lambda _: 1, 15),  # more steps, until there are 64 samples
        (1, lambda step: int(step % 2 == 0), 31),  # or 32 steps
        (24, lambda step: 12 * (step >= 20), 23),  # from a step on
        (24, lambda _: 5, None),
        (24, lambda step: 24 * (step % 8 == 0), None),
    ],
)
def test_many_samples_without_a_label(total: int, empty: Callable[[int], int], at: int | None) -> None:
    told = run(rows(lambda _: total, empty))
    assert told.openings == ([] if at is None else [(at, "rows_without_labels")])
    assert at is None or "samples have nothing to learn from" in told.blocks
    assert at is None or "their answer was cut off" in told.blocks


def test_a_step_without_any_label_is_none_of_it() -> None:
    def fail(drawn: Drawn) -> None:
        is_bare = drawn.step % 2 == 1
        rows(lambda _: 24, lambda _: 24 if is_bare else 0)(drawn)
        if is_bare:
            drawn.counts |= {"labelled": 0}

    assert {name for _, name in run(fail, 30).openings} == {"no_labels"}


@pytest.mark.parametrize(
    ("total", "twice", "at"),
    [
        (24, lambda _: 24, 2),
        (24, lambda _: 23, 2),
        (24, lambda _: 22, None),
        (4, lambda _: 4, 11),  # readings of 16 samples
        (24, lambda step: 24 * (step % 3 > 0), None),
        (0, lambda _: 0, None),
    ],
)
def test_samples_that_begin_twice(total: int, twice: Callable[[int], int], at: int | None) -> None:
    told = run(rows(lambda _: total, twice=twice))
    assert told.openings == ([] if at is None else [(at, "begun_twice")])
    assert at is None or "begin with one and the same token twice" in told.blocks
    assert at is None or "the beginning is added twice" in told.blocks


def test_samples_that_begin_with_two_images() -> None:
    def two_images(drawn: Drawn) -> None:
        rows(lambda _: TASK.batch, lambda _: 0, lambda _: TASK.batch)(drawn)
        drawn.changes["image_hashes"] = drawn.rng.integers(1, 2**62, 2 * TASK.batch)
        drawn.changes["image_deviations"] = np.full(2 * TASK.batch, 0.25, np.float32)

    assert run(two_images).openings == []


def test_without_ids_nobody_knows_how_samples_begin() -> None:
    assert run(rows(lambda _: 24, twice=lambda _: -1)).openings == []


@pytest.mark.parametrize("at", [3, 10, 25])
def test_its_state_goes_on_bit_for_bit(at: int) -> None:
    step = rows(lambda _: 5, lambda step: 3 * (step >= 15), lambda step: 5 * (step >= 20))
    whole, first, second = Watch(), Watch(), Watch()
    told = watched(trace(TASK, 40, failure=step), whole)
    before = watched(trace(TASK, at, failure=step), first)
    second.restore(first.state())
    after = watched(trace(TASK, 40 - at, failure=step, first=at), second)
    assert second.state() == whole.state()
    assert before.openings + after.openings == told.openings == [(20, "rows_without_labels")]


def test_samples_of_another_stage_are_not_pooled_with_it() -> None:
    def fail(drawn: Drawn) -> None:
        rows(lambda _: 24, lambda step: 24 * (step < 6))(drawn)
        drawn.stage = "another" if drawn.step == 7 else ""

    assert run(fail).openings == []


def pairs(before: float, two_before: float, three_before: float, number: int = 7) -> Failure:
    """Every step has so many pairs of answers, and these shares of them alike one, two and three ids before."""

    def fail(drawn: Drawn) -> None:
        rows(lambda _: 8)(drawn)
        shares = {"pairs_alike_before": before, "pairs_alike_two_before": two_before}
        drawn.counts["answer_pairs"] = number
        for name, share in {**shares, "pairs_alike_three_before": three_before}.items():
            drawn.counts[name] = round(share * number)

    return fail


@pytest.mark.parametrize(
    ("shares", "number", "at"),
    [
        ((0.2, 1.0, 1.0), 23, 8),  # off by one
        ((0.2, 0.3, 1.0), 23, 8),  # off by two
        ((0.0, 1.0, 1.0), 7, 29),  # more steps, until there are 64 pairs
        ((1.0, 1.0, 1.0), 23, None),
        ((0.8, 1.0, 1.0), 23, None),  # most answers are alike
        ((0.2, 0.3, 0.4), 23, None),  # there is no template
        ((1.0, 0.1, 1.0), 23, None),
    ],
)
def test_labels_that_begin_behind_the_first_tokens(
    shares: tuple[float, float, float], number: int, at: int | None
) -> None:
    told = run(pairs(*shares, number=number))
    assert told.openings == ([] if at is None else [(at, "labels_late")])
    assert at is None or "it must be the answer's first token" in told.blocks


def test_pairs_are_kept_over_a_restart_and_not_over_a_stage() -> None:
    steps = list(trace(TASK, 12, failure=pairs(0.0, 1.0, 1.0, number=23)))
    first, second = Watch(), Watch()
    watched(steps[:4], first)
    second.restore(first.state())
    assert watched(steps[4:], second).openings == watched(steps).openings == [(8, "labels_late")]


def prompts(answers: int, ends: int, labelled: Callable[[int], int]) -> Failure:
    """Every step compares so many answers with the samples' prompts, whose end stands in so many places."""

    def fail(drawn: Drawn) -> None:
        rows(lambda _: 8)(drawn)
        drawn.counts |= dict(zip(PROMPT_COUNTS, (answers, ends, labelled(drawn.step)), strict=True))

    return fail


@pytest.mark.parametrize(
    ("answers", "ends", "labelled", "at"),
    [
        (32, 0, lambda _: 0, 5),  # readings of 64 answers
        (32, 32, lambda _: 0, 5),
        (32, 0, lambda step: 32 * (step < 20), 25),
        (32, 32, lambda step: step % 2 == 0, None),  # one of 64 is enough
        (32, 32, lambda _: 32, None),
        (-1, -1, lambda _: -1, None),  # nothing is generated here
        (1, 0, lambda _: 0, None),  # too few
    ],
)
def test_answers_that_are_trained_in_other_places(
    answers: int, ends: int, labelled: Callable[[int], int], at: int | None
) -> None:
    told = run(prompts(answers, ends, labelled))
    assert told.openings == ([] if at is None else [(at, "template_differs")])
    assert at is None or "do not share their template" in told.blocks
    assert at is None or ("without a label behind it" in told.blocks) == (ends > 0)


def test_text_from_end_to_end_has_no_template() -> None:
    def fail(drawn: Drawn) -> None:
        prompts(32, 0, lambda _: 0)(drawn)
        drawn.counts |= {"positions": 800, "labelled": 800}

    assert "template_differs" not in {name for _, name in run(fail).openings}
