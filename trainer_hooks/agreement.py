"""What rank 0 decided and the other ranks take over: run, incarnation, endpoint and key, through the group's store.

No collective, and nothing that could hold up the trainer's own use of its store: a client of ours alone asks, on a
thread of its own, whether the key is there, and never waits inside the store for one that is not (docs/trainer.md,
section 7). The store is plain text that any host of the job can write: the key in it is the worker's public one.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.group_stores import cloned, default_store, is_cloneable

WAIT_SECONDS: Final = 5.0
"""How long a rank waits for rank 0's word; then it goes on without hooks."""
_FIRST_PAUSE_SECONDS: Final = 0.01
_LONGEST_PAUSE_SECONDS: Final = 0.2
_attachments = 0
"""How often this process attached: the ranks attach in the same order, so it names the same attachment on each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """The same on every rank."""

    run_id: str
    incarnation: str
    """Random id of this start of the training; a launcher's own run id repeats after a restart."""
    endpoint: str
    """Where rank 0 reaches the worker; a rank that was told another address of it uses that."""
    server_key: str = ""
    """The worker's public key, where rank 0 has one."""
    host: str = ""
    """Rank 0's host: a private socket is reached from there alone."""


def new_incarnation() -> str:
    """A random id."""
    return secrets.token_hex(8)


def host_name() -> str:
    """What this host calls itself."""
    return socket.gethostname()


def agree(
    mine: Agreed, rank: int, world_size: int, *, console: Console | None = None, wait_seconds: float = WAIT_SECONDS
) -> Agreed | None:
    """Take over what rank 0 says; no collective, and at most ``wait_seconds``.

    A store that fails is said on ``console``.

    Returns:
        None on a rank that did not hear from rank 0: it goes on without hooks.
    """
    global _attachments  # noqa: PLW0603  (counts attachments of the process)
    _attachments += 1
    if world_size <= 1:
        return mine
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    key = f"sidestep/attach/{restarts}/{world_size}/{_attachments}"
    until = time.monotonic() + wait_seconds
    console = console or Console()
    if rank == 0:
        _within(wait_seconds, lambda: _say(key, mine), console)
        return mine
    return _within(wait_seconds, lambda: _hear(key, until), console)


def _within(seconds: float, ask: Callable[[], Agreed | None], console: Console) -> Agreed | None:
    """What ``ask`` returns, None where it takes longer or fails: a store may hang for its half hour."""
    heard: list[Agreed | None] = []

    def run() -> None:
        try:
            heard.append(ask())
        except Exception as error:  # noqa: BLE001  (a store raises what it likes; it is said, and the training goes on)
            console.once("store", f"the process group's store fails: {error!r}")
            heard.append(None)

    thread = threading.Thread(target=run, name="sidestep-attach", daemon=True)
    thread.start()
    thread.join(seconds + _LONGEST_PAUSE_SECONDS)
    return heard[0] if heard else None


def _say(key: str, mine: Agreed) -> None:
    store = _own_store()
    if store is not None:
        store.set(key, json.dumps(asdict(mine)))


def _hear(key: str, until: float) -> Agreed | None:
    store = _own_store()
    pause_seconds = _FIRST_PAUSE_SECONDS
    while store is not None and not store.check([key]):
        if time.monotonic() >= until:
            return None
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
    return None if store is None else Agreed(**json.loads(store.get(key).decode("utf-8")))


def _own_store() -> Any:
    """A client of ours to the store of the process group; None without a group.

    A clone keeps the prefixes, which tell one start of the training from another. A file's store is used as it is: its
    clone counts as a rank that has left, and the file is then removed too early; it does not block either.
    """
    store = default_store()
    return cloned(store) if store is not None and is_cloneable(store) else store
