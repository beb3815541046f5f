"""The publisher's thread makes way for the training thread while that is within a hook.

Both want the interpreter's lock. Every operation of torch lets go of it, and whoever takes it then keeps it until a
piece of work is done, or for the interpreter's switch interval of 5 ms: hook calls of a third of a millisecond took
2 to 8 ms in one case of a thousand, and most while the publisher caught up with a worker that had stood still
(docs/reliability.md). So the publisher works in pieces, and asks between two of them whether a hook is at work.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

NAP_SECONDS = 0.001
"""Longer than most hooks take: a nap that ends too early costs the training thread a wake-up."""
LONGEST_SECONDS = 0.02
"""In one tick: generation holds a hook for seconds, and what waits is to leave all the same."""


PIECE_ITEMS = 64
"""Of a long loop over small things: some fifty microseconds."""

Item = TypeVar("Item")


class AtWork(Protocol):
    """What knows whether the training thread is within a hook."""

    @property
    def is_inside(self) -> bool:
        """Whether it is."""
        ...


_watched: list[weakref.ref[AtWork]] = []


def watch(hooks: AtWork) -> None:
    """Make way for these hooks as well, as long as they live."""
    _watched[:] = [each for each in _watched if each() is not None]
    _watched.append(weakref.ref(hooks))


def is_inside_a_hook() -> bool:
    """Return whether any hooks of this process are at work."""
    return any(hooks is not None and hooks.is_inside for hooks in [each() for each in tuple(_watched)])


class Courtesy:
    """How long one thread has waited for hooks in its present tick."""

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        """Begin with a whole allowance."""
        self._sleep = sleep
        self._left_seconds = LONGEST_SECONDS
        self.num_naps = 0
        """Times that it waited."""

    def new_tick(self) -> None:
        """Have the whole allowance again."""
        self._left_seconds = LONGEST_SECONDS

    def give_way(self) -> None:
        """Wait while a hook is at work, as long as the allowance lasts."""
        while self._left_seconds > 0 and is_inside_a_hook():
            self._left_seconds -= NAP_SECONDS
            self.num_naps += 1
            self._sleep(NAP_SECONDS)


class _OfThread(threading.local):
    courtesy: Courtesy | None = None


_of_thread = _OfThread()


def make_courteous() -> Courtesy:
    """Let ``give_way`` wait on the calling thread from now on; return what says how long."""
    _of_thread.courtesy = Courtesy()
    return _of_thread.courtesy


def give_way() -> None:
    """Wait while a hook is at work; called between two pieces of work, and nothing on a thread not made courteous."""
    courtesy = _of_thread.courtesy
    if courtesy is not None:
        courtesy.give_way()


def in_pieces(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, and make way after every ``PIECE_ITEMS``: a worker that comes back acks thousands at once."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % PIECE_ITEMS == 0:
            give_way()
