"""How long the publisher's thread rests."""

from __future__ import annotations

import pytest

from sidestep.protocol.limits import PUBLISHER_IDLE_TICK_SECONDS, PUBLISHER_TICK_SECONDS
from sidestep.trainer_hooks.pace import Pace


def test_a_publisher_with_something_to_send_is_quick_and_one_without_is_not() -> None:
    pace = Pace()
    assert pace.pause_seconds(has_more=True, blocked=False) == PUBLISHER_TICK_SECONDS
    assert pace.pause_seconds(has_more=False, blocked=False) == PUBLISHER_IDLE_TICK_SECONDS


def test_a_socket_without_room_is_asked_ever_less_often_until_it_has_some() -> None:
    pace = Pace()
    asked = [pace.pause_seconds(has_more=True, blocked=True) for _ in range(6)]
    assert asked[0] == PUBLISHER_TICK_SECONDS
    assert asked == sorted(asked)
    assert asked[-1] == PUBLISHER_IDLE_TICK_SECONDS
    assert pace.pause_seconds(has_more=True, blocked=False) == PUBLISHER_TICK_SECONDS
    assert pace.pause_seconds(has_more=True, blocked=True) == PUBLISHER_TICK_SECONDS


@pytest.mark.parametrize(
    ("step_seconds", "expected"), [(0.001, PUBLISHER_TICK_SECONDS), (0.13, 0.065), (3.0, PUBLISHER_IDLE_TICK_SECONDS)]
)
def test_there_are_two_ticks_a_step_within_bounds(step_seconds: float, expected: float) -> None:
    pace = Pace()
    now = 100.0
    for num_steps in (1, 3, 1, 2, 4):  # a tick may find several
        now += num_steps * step_seconds
        pace.steps_ended(num_steps, now)
    assert pace.pause_seconds(has_more=False, blocked=False) == pytest.approx(expected)


def test_one_long_pause_of_the_training_does_not_slow_it_down_for_long() -> None:
    pace = Pace()
    now = 0.0
    for step in range(20):
        now += 600.0 if step == 8 else 0.1
        pace.steps_ended(1, now)
    assert pace.pause_seconds(has_more=False, blocked=False) == pytest.approx(0.05, rel=0.1)
