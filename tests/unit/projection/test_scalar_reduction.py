"""One value of several ranks, as they asked."""

from __future__ import annotations

import math

import pytest

from sidestep.protocol.messages import Scalars
from sidestep.worker.records import Part
from sidestep.worker.scalar_reduction import spoken_scalars
from sidestep.worker.scalar_rows import scalar_rows


def part(rank: int, value: object, reduce: str = "mean", name: str = "x", key_step: int = 3) -> Part:
    return Part(rank=rank, message=Scalars(step=3, values={name: value}, reduce=reduce, key_step=key_step))


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 4.0), ("sum", 12.0), ("min", 1.0), ("max", 9.0), ("", 1.0)])
def test_ranks_are_reduced_as_they_ask(reduce: str, expected: float) -> None:
    laid = scalar_rows([part(2, 9.0, reduce), part(0, 1.0, reduce), part(1, 2, reduce)], {})
    assert laid.rows == [{"x": expected}]


def test_the_second_of_a_rank_is_reduced_with_the_second_of_the_others() -> None:
    spoken = spoken_scalars([part(0, 1.0), part(0, 10.0), part(1, 3.0), part(1, 30.0)])
    assert [message.values["x"] for _, message in spoken] == [2.0, 20.0]


def test_another_axis_or_another_name_is_another_value() -> None:
    spoken = spoken_scalars([part(0, 1.0), part(1, 3.0, key_step=4), part(1, 5.0, name="y")])
    assert [message.values for _, message in spoken] == [{"x": 1.0}, {"x": 3.0}, {"y": 5.0}]


def test_texts_are_the_lowest_ranks_and_what_is_no_number_makes_none() -> None:
    assert scalar_rows([part(1, "b"), part(0, "a")], {}).rows == [{"x": "a"}]
    broken = scalar_rows([part(0, 1.0), part(1, math.inf)], {})
    assert (broken.rows, broken.num_nonfinite) == ([{}], 1)


def test_a_reduction_that_is_not_known_is_none() -> None:
    assert scalar_rows([part(0, 1.0, "median"), part(1, 3.0, "median")], {}).rows == [{"x": 1.0}]
