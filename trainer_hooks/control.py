"""Commands at a step boundary: taken when the trainer asks, obeyed if it wants to, lost if anything fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from sidestep.protocol.messages import Command

ACTIONS = frozenset({"stop", "checkpoint", "sample"})
"""What a trainer can be asked to do; anything else is left out and counted."""
_REMEMBERED_IDS = 64


class Agreement(Protocol):
    """How the ranks agree on the step at which a command is taken."""

    def reached(self, command: Command, step: int) -> bool:
        """Return whether ``command`` is taken at the boundary of ``step``, on this rank and so on every other."""


class SingleProcessAgreement:
    """One process agrees with itself: a command is taken at the first boundary that it allows."""

    def reached(self, command: Command, step: int) -> bool:
        """Return whether ``step`` is not before ``command.at_step``."""
        return step >= command.at_step


class Control:
    """Hands the trainer at most one command per step boundary; each command once, whatever the worker repeats."""

    def __init__(self, take_command: Callable[[], Command | None], agreement: Agreement | None = None) -> None:
        """Take commands from ``take_command`` (``Publisher.take_command``)."""
        self._take_command = take_command
        self._agreement = agreement or SingleProcessAgreement()
        self._waiting: deque[Command] = deque()
        self._seen: deque[str] = deque(maxlen=_REMEMBERED_IDS)
        self.num_unknown = 0
        """Commands with an action that this version does not know."""

    def at_boundary(self, step: int) -> Command | None:
        """Return the command to obey after ``step``, or None; never waits."""
        while (command := self._take_command()) is not None:
            self._admit(command)
        for command in self._waiting:
            if self._agreement.reached(command, step):
                self._waiting.remove(command)
                return command
        return None

    def _admit(self, command: Command) -> None:
        if command.action not in ACTIONS:
            self.num_unknown += 1
        elif not command.command_id or command.command_id not in self._seen:
            self._seen.append(command.command_id)
            self._waiting.append(command)
