"""Methods of one instance are wrapped and put back, whatever was there before and whoever came after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sidestep.trainer_hooks.integrations.wrapped_method import WrappedMethod


class Clipper:
    def clip(self, value: float) -> float:
        return min(value, 1.0)


def around(calls: list[float]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def clip(value: float) -> Any:
            calls.append(value)
            return original(value)

        return clip

    return wrap


def test_a_method_is_wrapped_on_its_instance_alone_and_put_back() -> None:
    calls: list[float] = []
    mine, other = Clipper(), Clipper()
    wrapped = WrappedMethod(mine, "clip", around(calls))
    assert (mine.clip(3.0), other.clip(4.0)) == (1.0, 1.0)
    wrapped.undo()
    assert mine.clip(5.0) == 1.0
    assert calls == [3.0]
    assert vars(mine) == {}


def test_what_the_instance_had_of_its_own_comes_back() -> None:
    calls: list[float] = []
    mine: Any = Clipper()

    def own(value: float) -> float:
        return value * 2

    mine.clip = own
    wrapped = WrappedMethod(mine, "clip", around(calls))
    assert mine.clip(3.0) == 6.0
    wrapped.undo()
    assert mine.clip is own


def test_a_wrapper_that_came_later_stays() -> None:
    calls: list[float] = []
    mine: Any = Clipper()
    wrapped = WrappedMethod(mine, "clip", around(calls))
    beneath = mine.clip

    def later(value: float) -> float:
        return float(beneath(value)) + 10

    mine.clip = later
    wrapped.undo()
    wrapped.undo()
    assert mine.clip is later
    assert mine.clip(3.0) == 11.0
