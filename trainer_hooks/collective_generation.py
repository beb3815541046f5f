"""Generation from a sharded model, where every forward is a collective: all ranks take part, or none does.

A rank that leaves such a forward would leave the others waiting in it. So an exception in it is the one of the hooks'
that reaches the training: the rank ends, and what the others wait for fails (docs/distributed.md).
"""

from __future__ import annotations

import torch
from torch import nn

from sidestep.trainer_hooks.group_stores import default_store

_KEY = "sidestep/generation"


class CollectiveGenerationError(BaseException):
    """A generation over all ranks failed on this one: it must end, or the others wait for it for ever.

    No ``Exception``: a handler that went on training would leave this rank's collectives out of step with the others'.
    """


class EveryRank:
    """Whether all ranks of the group take part; found out once, after a first step of all of them."""

    def __init__(self, incarnation: str, world_size: int) -> None:
        """Say that this rank takes part; before the training's first collective.

        Raises:
            Exception: whatever the group's store raises.
        """
        self._key = f"{_KEY}/{incarnation}"
        self._world_size = world_size
        self._found: bool | None = None
        default_store().add(self._key, 1)

    def take_part(self) -> bool:
        """Return the same on every rank, once each has been through a collective since it said so.

        Raises:
            CollectiveGenerationError: this rank cannot find out, and the others may have begun.
        """
        if self._found is None:
            try:
                self._found = int(default_store().add(self._key, 0)) == self._world_size
            except Exception as error:
                raise CollectiveGenerationError("the group's store does not say which ranks take part") from error
        return self._found


def put_shares_back(model: nn.Module) -> None:
    """Let FSDP2 free what it gathered for a forward that no backward follows."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(getattr(module, "_get_fsdp_state", None)) and callable(reshard):
            with torch.no_grad():
                reshard()
