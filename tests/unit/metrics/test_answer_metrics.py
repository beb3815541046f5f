"""``data/*``: every answer of the epoch once, whatever was rolled back, restored or late."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sidestep.protocol.messages import Answers
from sidestep.protocol.tables import decode_table, encode_table
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.metrics.answers import count_answers, measure_answers
from sidestep.worker.metrics.measurement import length_histogram
from sidestep.worker.records import Part, RunContext


class NoText:
    """Nothing here has a text."""

    def token(self, token_id: int) -> str:
        raise AssertionError(token_id)

    def text(self, ids: Sequence[int]) -> str:
        raise AssertionError(ids)


CONTEXT = RunContext(run_id="r", attempt=0, text=NoText())


def message(step: int, lengths: Iterable[int], epoch: int = 0, **fields: Any) -> Answers:
    distinct, counts = np.unique(np.array(list(lengths), np.int32), return_counts=True)
    return Answers(
        step=step, epoch=epoch, lengths=distinct.astype(np.int32), counts=counts.astype(np.int64), labelled=9,
        batches=1, **fields,
    )  # fmt: skip


def take(counts: AnswerCounts, attempt: int, *messages: Answers) -> None:
    parts = [Part(rank=rank, message=m) for rank, m in enumerate(messages)]
    assert count_answers(parts, CONTEXT, attempt, counts).malformed_parts == 0


def started(attempt: int = 0, step: int = 0) -> AnswerCounts:
    counts = AnswerCounts()
    assert counts.begin(attempt, step)
    return counts


def test_the_epoch_so_far_by_hand_with_and_without_the_suffix() -> None:
    counts = started()
    take(counts, 0, message(0, [1, 1, 4]), message(0, [1]))
    take(counts, 0, message(1, [7, 1]))
    lengths = [1, 1, 4, 1, 7, 1]
    values = measure_answers(counts, 0).values
    for suffix in ("", "_epoch_0"):
        assert values[f"data/answer_length_mean{suffix}"] == statistics.fmean(lengths)
        assert values[f"data/answer_length_std{suffix}"] == pytest.approx(statistics.stdev(lengths), rel=1e-12)
        assert values[f"data/answer_length_min{suffix}"] == 1
        assert values[f"data/answer_length_max{suffix}"] == 7
        assert values[f"data/single_token_answers_ratio{suffix}"] == 4 / 6
        histogram = values[f"data/answer_length_histogram{suffix}"]
        assert isinstance(histogram, dict)
        assert histogram["counts"] == [4, 0, 0, 1, 0, 0, 1]
        assert histogram["edges"] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert values["epoch"] == 0
    assert values["data/batches_without_labels"] == 0


def test_one_answer_has_no_std_and_none_has_nothing() -> None:
    counts = started()
    assert measure_answers(counts, 0).values == {"data/batches_without_labels": 0}
    take(counts, 0, message(0, []), message(0, [0]))
    values = measure_answers(counts, 0).values
    assert values["data/answer_length_mean"] == 0.0
    assert values["data/single_token_answers_ratio"] == 0.0
    assert "data/answer_length_std" not in values


def test_a_new_epoch_begins_anew_and_the_old_one_is_closed_once() -> None:
    counts = started()
    take(counts, 0, message(49, [2], epoch=0))
    measure_answers(counts, 0)
    take(counts, 0, message(50, [4, 4], epoch=0))
    take(counts, 0, message(51, [9], epoch=1))
    values = measure_answers(counts, 1).values
    assert values["data/answer_length_mean_epoch_0"] == 10 / 3
    assert values["data/answer_length_mean_epoch_1"] == values["data/answer_length_mean"] == 9.0
    assert values["epoch"] == 1
    assert "data/answer_length_mean_epoch_0" not in measure_answers(counts, 1).values


def test_late_answers_of_a_rolled_back_step_do_not_come_back() -> None:
    counts = started()
    take(counts, 0, message(4, [1]))
    counts.begin(1, 5)
    take(counts, 0, message(7, [9]), message(3, [2]), message(5, [9]))
    take(counts, 1, message(5, [3]))
    assert counts.lengths(0) == {1: 1, 2: 1, 3: 1}
    assert not counts.begin(1, 5), "an attempt begins once"
    assert counts.lengths(0) == {1: 1, 2: 1, 3: 1}


def test_tensor_parallel_copies_count_once_however_late_they_come() -> None:
    mesh = replace(CONTEXT, topologies={0: {"data_parallel_rank": 0}, 1: {"data_parallel_rank": 0}})
    counts = started()
    for rank in (1, 0):
        count_answers([Part(rank=rank, message=message(0, [2]))], mesh, 0, counts)
    assert counts.lengths(0) == {2: 1}


def test_the_state_is_small_and_does_not_grow_with_the_steps() -> None:
    counts = started()
    random = np.random.default_rng(0)
    for step in range(3_000):
        counts.add(
            attempt=0, step=step, epoch=step // 100, lengths={int(n): 3 for n in random.integers(1, 400, 25)}
        )  # fmt: skip
    assert len(encode_table(counts.state())) < 8_000


def test_state_restores_to_the_same_future() -> None:
    one = started()
    take(one, 0, message(0, [1, 2], batches_without_labels=2), message(0, [3]))
    two = AnswerCounts()
    two.restore(decode_table(encode_table(one.state())))
    for each in (one, two):
        each.begin(1, 0)
        take(each, 1, message(0, [8], epoch=1))
    assert measure_answers(one, 1).values == measure_answers(two, 1).values
    assert one.batches_without_labels == two.batches_without_labels == 2
    assert encode_table(one.state()) == encode_table(two.state())


@pytest.mark.parametrize(
    "fields",
    [
        {"lengths": np.array([1], np.int32)},
        {"counts": np.array([-1, 1], np.int64)},
        {"lengths": np.array([-1, 1], np.int32)},
        {"lengths": np.array([1, 1], np.int32)},
    ],
)
def test_parts_that_contradict_themselves_are_left_out_and_counted(fields: dict[str, Any]) -> None:
    arrays = {"lengths": np.array([1, 2], np.int32), "counts": np.array([1, 1], np.int64), **fields}
    broken = Answers(step=0, epoch=0, labelled=0, batches=1, **arrays)
    counts = started()
    assert count_answers([Part(rank=0, message=broken)], CONTEXT, 0, counts).malformed_parts == 1
    assert not counts.lengths(0)


def test_a_histogram_of_many_lengths_has_at_most_512_equal_bins_and_loses_nothing() -> None:
    lengths = {n: n % 7 + 1 for n in range(0, 2_000, 3)}
    value = length_histogram(lengths)
    assert isinstance(value, dict)
    assert len(value["counts"]) <= 512
    assert sum(value["counts"]) == sum(lengths.values())
    widths = set(np.diff(value["edges"]).tolist())
    assert widths == {4.0}
    for low, high, count in zip(value["edges"], value["edges"][1:], value["counts"], strict=False):
        assert count == sum(c for n, c in lengths.items() if low < n < high)
