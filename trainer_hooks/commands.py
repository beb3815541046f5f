"""What the worker asks of the trainer, and what becomes of it: taken at a boundary, and answered to the worker."""

from __future__ import annotations

from collections.abc import Callable

from sidestep.protocol.messages import COMMAND_LATE, COMMAND_TAKEN, Command, Notice
from sidestep.trainer_hooks.boundary import StoreAgreement, group_store
from sidestep.trainer_hooks.control import Agreement, Control, SingleProcessAgreement
from sidestep.trainer_hooks.topology import Topology
from sidestep.trainer_hooks.transport import Transport


class Commands:
    """Commands of one training on this rank; on the training thread."""

    def __init__(self, transport: Transport, topology: Topology, incarnation: str) -> None:
        """Take commands from ``transport``, and answer on it."""
        self._transport = transport
        self._control = Control(transport.take_command, _agreement(topology, incarnation))

    def take_sample(self, step: int) -> bool:
        """Return whether samples are wished for before the next due generation; the wish is answered."""
        wish = self._control.take_sample()
        if wish is not None:
            self._answer(wish, step, taken=True)
        return wish is not None

    def at_boundary(self, step: int, on_incident: Callable[[Command], object] | None) -> Command | None:
        """Return the command that all ranks take after ``step``, or None; ``on_incident`` is told of it.

        Raises:
            Exception: whatever ``on_incident`` raises.
        """
        command = self._control.at_boundary(step)
        while self._control.over:
            self._answer(self._control.over.pop(), step, taken=False)
        if command is not None:
            self._answer(command, step, taken=True)
            if on_incident is not None:
                on_incident(command)
        return command

    def _answer(self, command: Command, step: int, *, taken: bool) -> None:
        said = f"taken after step {step}" if taken else "not all ranks heard of it in time"
        text = f"sidestep: {command.action} ({command.reason}): {said}"
        code = (COMMAND_TAKEN if taken else COMMAND_LATE) + command.command_id
        self._transport.submit(Notice(text=text, code=code, level="info", step=step))


def _agreement(topology: Topology, incarnation: str) -> Agreement:
    if topology.world_size == 1:
        return SingleProcessAgreement()
    return StoreAgreement(lambda: group_store(incarnation), world_size=topology.world_size, incarnation=incarnation)
