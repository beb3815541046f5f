"""The publisher makes way for hooks between two pieces of work, and not for ever."""

from __future__ import annotations

import threading

import pytest
import torch

from sidestep.trainer_hooks import courtesy
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.courtesy import LONGEST_SECONDS, NAP_SECONDS, Courtesy
from sidestep.trainer_hooks.guard import Guard, guarded


class Hooks:
    """Hooks with one entrance."""

    def __init__(self) -> None:
        self.guard = Guard(Console())
        self.seen: list[bool] = []

    @guarded
    def hook(self, *, fails: bool = False) -> None:
        """Look at what another thread would see."""
        self.seen.append(courtesy.is_inside_a_hook())
        if fails:
            raise RuntimeError("on purpose")


def test_a_hook_is_seen_while_it_runs_and_not_after_it_failed() -> None:
    hooks = Hooks()
    assert not courtesy.is_inside_a_hook()
    hooks.hook()
    hooks.hook(fails=True)
    assert hooks.seen == [True, True]
    assert not courtesy.is_inside_a_hook()


def test_it_waits_until_the_hook_is_left() -> None:
    guard = Guard(Console())
    records = guard.enter()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            guard.leave(records)

    Courtesy(sleep).give_way()
    assert naps == [NAP_SECONDS] * 3


def test_a_hook_that_takes_long_does_not_hold_up_what_waits() -> None:
    guard = Guard(Console())
    records = guard.enter()
    naps: list[float] = []
    courteous = Courtesy(naps.append)
    try:
        for _ in range(1_000):
            courteous.give_way()
        assert sum(naps) == pytest.approx(LONGEST_SECONDS)
        courteous.new_tick()
        courteous.give_way()
        assert sum(naps) == pytest.approx(2 * LONGEST_SECONDS)
    finally:
        guard.leave(records)


def test_only_a_courteous_thread_waits() -> None:
    guard = Guard(Console())
    records = guard.enter()
    napped: list[int] = []

    def publish() -> None:
        mine = courtesy.make_courteous()
        courtesy.give_way()
        napped.append(mine.num_naps)

    try:
        courtesy.give_way()  # this thread is within the hook itself: it would wait for its own end
        thread = threading.Thread(target=publish)
        thread.start()
        thread.join(timeout=10)
    finally:
        guard.leave(records)
    assert napped
    assert napped[0] > 0


def test_hooks_that_are_gone_are_not_waited_for() -> None:
    with torch.enable_grad():  # which a hook that is never left would keep off
        guard = Guard(Console())
        guard.enter()
        assert courtesy.is_inside_a_hook()
        del guard
    assert not courtesy.is_inside_a_hook()
    assert torch.is_grad_enabled()


def test_long_loops_make_way_between_their_pieces() -> None:
    guard = Guard(Console())
    done: list[tuple[list[int], int]] = []

    def publish() -> None:
        mine = courtesy.make_courteous()
        done.append((list(courtesy.in_pieces(range(3 * courtesy.PIECE_ITEMS))), mine.num_naps))

    records = guard.enter()
    try:
        thread = threading.Thread(target=publish)
        thread.start()
        thread.join(timeout=10)
    finally:
        guard.leave(records)
    ((items, num_naps),) = done
    assert items == list(range(3 * courtesy.PIECE_ITEMS))
    assert num_naps > 0
