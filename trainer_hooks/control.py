"""Commands at a step boundary: taken when the trainer asks, obeyed if it wants to, lost if anything fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from sidestep.protocol.messages import Command

ACTIONS = frozenset({"stop", "checkpoint", "sample", "incident"})
"""What a trainer can be asked to do; anything else is left out and counted."""
SAMPLE = "sample"
_REMEMBERED_IDS = 64


class Agreement(Protocol):
    """How the ranks agree on the step at which a command is taken."""

    def propose(self, command: Command) -> None:
        """A command has come to this rank; returns at once."""
        ...

    def passed(self, step: int) -> None:
        """The training has come to the boundary of ``step``."""
        ...

    def reached(self, command: Command, step: int) -> bool:
        """Return whether ``command`` is taken at the boundary of ``step``, on this rank and so on every other."""
        ...

    def is_over(self, command: Command, step: int) -> bool:
        """Return whether ``command`` can no longer be taken after ``step``."""
        ...


class SingleProcessAgreement:
    """One process agrees with itself: a command is taken at the first boundary that it allows."""

    def propose(self, command: Command) -> None:
        """There is nobody to tell."""

    def passed(self, step: int) -> None:
        """There is nobody to tell."""

    def reached(self, command: Command, step: int) -> bool:
        """Return whether ``step`` is not before ``command.at_step``."""
        return step >= command.at_step

    def is_over(self, command: Command, step: int) -> bool:  # noqa: ARG002  (others look at them)
        """It never is."""
        return False


class Control:
    """Hands the trainer at most one command per step boundary; each command once, whatever the worker repeats."""

    def __init__(self, take_command: Callable[[], Command | None], agreement: Agreement | None = None) -> None:
        """Take commands from ``take_command`` (``Publisher.take_command``)."""
        self._take_command = take_command
        self._agreement = agreement or SingleProcessAgreement()
        self._waiting: deque[Command] = deque()
        self._seen: deque[tuple[str, int]] = deque(maxlen=_REMEMBERED_IDS)
        self.num_unknown = 0
        """Commands with an action that this version does not know."""
        self.over: list[Command] = []
        """Commands that the ranks did not agree on in time, until the caller takes them."""

    def at_boundary(self, step: int) -> Command | None:
        """Return the command to obey after ``step``, or None."""
        self._take_in()
        self._agreement.passed(step)
        for command in tuple(self._waiting):
            if self._agreement.reached(command, step):
                self._waiting.remove(command)
                return command
            if self._agreement.is_over(command, step):
                self._waiting.remove(command)
                self.over.append(command)
        return None

    def take_sample(self) -> Command | None:
        """Return a wish for samples, which one rank can fulfil without the others; None where there is none."""
        self._take_in()
        wish = next((command for command in self._waiting if command.action == SAMPLE), None)
        if wish is not None:
            self._waiting.remove(wish)
        return wish

    def _take_in(self) -> None:
        while (command := self._take_command()) is not None:
            if command.action not in ACTIONS:
                self.num_unknown += 1
                continue
            key = (command.command_id, command.at_step)
            if command.command_id and key in self._seen:
                continue
            self._seen.append(key)
            self._waiting.append(command)
            if command.action != SAMPLE:
                self._agreement.propose(command)
