"""One step for all ranks to take a command at, without a collective (docs/trainer.md, section 7).

The worker proposes a step S ahead of all ranks. On each rank a thread of its own, which never touches the training's
clients, announces the rank in the group's store while the rank has not reached S. At S the announced ranks agree by one
compare-and-set: "commit" where all were announced, else "abort". Acting on receipt instead split most trials.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from sidestep.protocol.messages import Command

COMMIT: Final = "commit"
ABORT: Final = "abort"
_ANSWER_SECONDS: Final = 2.0
"""How long an operation on the store may take before the command is let go: the longest that a boundary can wait."""


class StoreAgreement:
    """Ranks of one process group agree on the step of a command; whatever fails, the command is not taken.

    ``propose`` belongs to whoever receives commands, ``reached`` and ``passed`` to the training thread.
    """

    def __init__(self, open_store: Callable[[], Any], *, world_size: int, incarnation: str) -> None:
        """Agree with ``world_size`` ranks through the store that ``open_store`` gives, once the first command comes.

        Args:
            open_store: returns a ``torch.distributed`` store of this object's own (a clone); called on its thread.
            world_size: ranks that have to be announced.
            incarnation: keeps the keys of this start of the training apart from an earlier one's.
        """
        self._open_store = open_store
        self._world_size = world_size
        self._incarnation = incarnation
        self._lock = threading.Lock()
        self._step = -1
        self._armed: set[str] = set()
        self._proposed: deque[Command] = deque()
        self._arrived = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self.errors = 0
        """Operations on the store that failed."""
        self.aborted: deque[str] = deque(maxlen=64)
        """Commands that not all ranks heard of in time: the worker may propose them for a later step."""

    def propose(self, command: Command) -> None:
        """Announce this rank for ``command``, on a thread of its own; returns at once."""
        self._proposed.append(command)
        if self._thread is None:
            self._thread = threading.Thread(target=self._announce, name="sidestep-control", daemon=True)
            self._thread.start()
        self._arrived.set()

    def _announce(self) -> None:
        while True:
            self._arrived.wait()
            self._arrived.clear()
            while self._proposed:
                command = self._proposed.popleft()
                try:
                    self._arm(command)
                except Exception:  # noqa: BLE001  (a store raises what it likes; counted, and the command aborts)
                    self.errors += 1

    def _arm(self, command: Command) -> None:
        if self._store is None:
            self._store = self._open_store()
        with self._lock:
            if command.at_step < 0 or self._step >= command.at_step:
                self.aborted.append(command.command_id)
                return
            # Under the lock: the training thread cannot pass the step between the look and the announcement.
            self._store.add(self._key("arm", command), 1)
            self._armed.add(command.command_id)

    def _key(self, what: str, command: Command) -> str:
        return f"sidestep/{self._incarnation}/{what}/{command.command_id}/{command.at_step}"

    def passed(self, step: int) -> None:
        """The training has come to the boundary of ``step``."""
        if self._thread is None:  # nothing was ever proposed: nobody else looks
            self._step = max(self._step, step)
            return
        with self._lock:
            self._step = max(self._step, step)

    def reached(self, command: Command, step: int) -> bool:
        """Return whether all ranks take ``command`` at the boundary of ``step``; call ``passed(step)`` before."""
        if step != command.at_step or command.command_id not in self._armed:
            return False
        self._armed.discard(command.command_id)
        try:
            everybody = self._store.add(self._key("arm", command), 0) == self._world_size
            decided = self._store.compare_set(self._key("decision", command), "", COMMIT if everybody else ABORT)
        except Exception:  # noqa: BLE001  (fail open: the training goes on)
            self.errors += 1
            return False
        said = decided.decode("utf-8") if isinstance(decided, bytes) else str(decided)
        if said != COMMIT:
            self.aborted.append(command.command_id)
        return said == COMMIT

    def is_over(self, command: Command, step: int) -> bool:
        """Return whether ``command`` can no longer be taken after ``step``."""
        return command.at_step <= step


def group_store(incarnation: str) -> Any:
    """Return a client of the process group's store for this use alone.

    A blocking call on the trainer's own client would hold up its groups; where a store cannot be cloned (a file), the
    group's own serves, with calls that do not block.

    Raises:
        RuntimeError: there is no process group.
    """
    from sidestep.trainer_hooks.group_stores import cloned, default_store, innermost, is_cloneable, prefixed  # noqa: PLC0415

    store = default_store()
    if store is None:
        raise RuntimeError("there is no process group")
    inner = innermost(store)
    if is_cloneable(inner):
        inner = cloned(inner)
        inner.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
    return prefixed(f"sidestep-control/{incarnation}", inner)
