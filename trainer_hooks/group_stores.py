"""The store in which a process group met, and clients of ours to it: torch offers no public way to either."""

from __future__ import annotations

from typing import Any

import torch

_stores: Any = torch.distributed  # whose stores are not typed as its own


def default_store() -> Any:
    """Return the trainer's own client of its process group's store; None without a group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed import distributed_c10d  # noqa: PLC0415  (only where there is a process group)

    return distributed_c10d._get_default_store()  # noqa: SLF001  (there is no public way)


def innermost(store: Any) -> Any:
    """Return what a store is beneath its prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def is_cloneable(store: Any) -> bool:
    """Whether another client of the same store does no harm.

    A file's clone counts as a rank that has left, and the file is then removed too early.
    """
    return isinstance(innermost(store), _stores.TCPStore)


def cloned(store: Any) -> Any:
    """Return another client of a store that can be cloned: a blocking call on the trainer's own holds up its groups."""
    if hasattr(store, "clone"):
        return store.clone()
    inner = innermost(store)
    return _stores.TCPStore(inner.host, inner.port, is_master=False, wait_for_workers=False)


def prefixed(prefix: str, store: Any) -> Any:
    """Return the same store, in which all keys begin with a prefix."""
    return _stores.PrefixStore(prefix, store)
