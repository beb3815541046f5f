"""What rank 0 decided and the other ranks take over: run, incarnation and endpoint, through the group's store."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch

_WAIT = timedelta(seconds=5)
_attachments = 0
"""How often this process attached: the ranks attach in the same order, so it names the same attachment on each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """The same on every rank."""

    run_id: str
    incarnation: str
    """Random id of this start of the training; a launcher's own run id repeats after a restart."""
    endpoint: str


def new_incarnation() -> str:
    """A random id."""
    return secrets.token_hex(8)


def agree(mine: Agreed, rank: int, world_size: int) -> Agreed | None:
    """Take over what rank 0 says; no collective, and at most five seconds.

    Returns:
        None on a rank that did not hear from rank 0: it goes on without hooks.
    """
    global _attachments  # noqa: PLW0603  (counts attachments of the process)
    _attachments += 1
    if world_size <= 1:
        return mine
    store: Any = _store()
    if store is None:
        return None
    key = f"sidestep/attach/{_attachments}"
    if rank == 0:
        store.set(key, json.dumps(asdict(mine)))
        return mine
    try:
        store.wait([key], _WAIT)
    except Exception:  # noqa: BLE001  (stores raise what they like when time is up: the caller warns)
        return None
    return Agreed(**json.loads(store.get(key).decode("utf-8")))


def _store() -> Any:
    """The process group's store, which every launcher sets up; None without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed import distributed_c10d  # noqa: PLC0415  (only where there is a process group)

    # Not a clone of it: a FileStore's clone counts as a rank that has left, and the file is then removed too early.
    return distributed_c10d._get_default_store()  # noqa: SLF001  (torch offers no public way to its own store)
