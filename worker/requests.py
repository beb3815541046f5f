"""What the worker asks of trainers: which step it proposes, what became of it, and when it is proposed again.

A wish for samples is for whichever rank generates, at its next boundary. Everything else is taken by all ranks at one
step or by none (docs/trainer.md, section 7): it is proposed for a step ahead, and further ahead where that was too
near.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from sidestep.protocol.messages import COMMAND_LATE, COMMAND_TAKEN, Command, Notice

_LOG: Final = logging.getLogger(__name__)

FIRST_MARGIN_STEPS: Final = 20
"""How far ahead of the newest step a command is proposed at first."""
MAX_PROPOSALS: Final = 6
"""The last one is 640 steps ahead."""
SAMPLE: Final = "sample"
MAX_OPEN: Final = 64


@dataclass(slots=True)
class _Open:
    command: Command
    world_size: int
    proposals: int = 1


class Requests:
    """The commands of one worker's runs; one thread calls it."""

    def __init__(self, send: Callable[[str, Command], object]) -> None:
        """Send commands by ``send(run id, command)``."""
        self._send = send
        self._open: dict[tuple[str, str], _Open] = {}
        self.counts = {"asked": 0, "taken": 0, "proposed_again": 0, "given_up": 0}
        """Commands by what became of them."""

    def ask(self, run_id: str, command: Command, *, world_size: int, newest_step: int) -> None:
        """Ask for something; what asks for the same under the same id is asked once.

        Args:
            run_id: whose trainer.
            command: action, id and reason; its step is chosen here.
            world_size: ranks that have to agree.
            newest_step: the newest step that any rank is known to have ended.
        """
        key = (run_id, command.command_id)
        if key in self._open:
            return
        while len(self._open) >= MAX_OPEN:
            self._open.pop(next(iter(self._open)))
            self.counts["given_up"] += 1
        self._open[key] = _Open(command, world_size)
        self.counts["asked"] += 1
        self._propose(run_id, self._open[key], newest_step)

    def _propose(self, run_id: str, asked: _Open, newest_step: int) -> None:
        agreed = asked.world_size > 1 and asked.command.action != SAMPLE
        margin = FIRST_MARGIN_STEPS << (asked.proposals - 1)
        asked.command = replace(asked.command, at_step=newest_step + margin if agreed else -1)
        self._send(run_id, asked.command)

    def heard(self, run_id: str, notice: Notice) -> None:
        """Take a trainer's answer in; other notices are none of this."""
        for prefix in (COMMAND_TAKEN, COMMAND_LATE):
            if notice.code.startswith(prefix):
                asked = self._open.get((run_id, notice.code.removeprefix(prefix)))
                if asked is not None:
                    self._answered(run_id, asked, notice, is_taken=prefix == COMMAND_TAKEN)

    def _answered(self, run_id: str, asked: _Open, notice: Notice, *, is_taken: bool) -> None:
        if is_taken:
            self._close(run_id, asked, "taken")
        elif notice.step < asked.command.at_step:
            return  # another rank's answer to an earlier proposal
        elif asked.proposals >= MAX_PROPOSALS:
            _LOG.warning("run %s: %s was proposed %d times, and never heard of by all ranks in time", run_id,
                         asked.command.action, asked.proposals)  # fmt: skip
            self._close(run_id, asked, "given_up")
        else:
            asked.proposals += 1
            self.counts["proposed_again"] += 1
            self._propose(run_id, asked, notice.step)

    def _close(self, run_id: str, asked: _Open, how: str) -> None:
        self._open.pop((run_id, asked.command.command_id), None)
        self.counts[how] += 1
