"""Commands at a step boundary."""

from __future__ import annotations

from collections import deque

from sidestep.protocol.messages import Command
from sidestep.trainer_hooks.control import Control


def control_of(*commands: Command) -> Control:
    waiting = deque(commands)
    return Control(lambda: waiting.popleft() if waiting else None)


def test_a_command_is_taken_at_the_first_boundary_that_it_allows() -> None:
    command = Command(action="stop", command_id="1", at_step=5)
    control = control_of(command)
    assert [control.at_boundary(step) for step in (3, 4, 5, 6)] == [None, None, command, None]


def test_a_repeated_command_is_taken_once_and_others_in_order() -> None:
    first = Command(action="checkpoint", command_id="1")
    second = Command(action="sample", command_id="2")
    control = control_of(first, first, second, first)
    assert [control.at_boundary(1) for _ in range(3)] == [first, second, None]


def test_a_command_that_waits_does_not_hold_up_others() -> None:
    later = Command(action="stop", command_id="1", at_step=50)
    now = Command(action="checkpoint", command_id="2")
    control = control_of(later, now)
    assert control.at_boundary(1) is now
    assert control.at_boundary(50) is later


def test_an_unknown_action_is_left_out_and_counted() -> None:
    control = control_of(Command(action="reboot", command_id="1"))
    assert control.at_boundary(1) is None
    assert control.num_unknown == 1
