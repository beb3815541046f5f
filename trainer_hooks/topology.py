"""Which rank this is, and how the model is wrapped."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sidestep.trainer_hooks.parameters import unwrapped

_WRAPPERS = {
    "DistributedDataParallel": "ddp",
    "DataParallel": "dp",
    "FullyShardedDataParallel": "fsdp1",
    "DeepSpeedEngine": "deepspeed",
    "OptimizedModule": "compile",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The place of this process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    wrapper: str
    """``none``, ``ddp``, ``dp``, ``fsdp1``, ``fsdp2``, ``deepspeed``."""
    compiled: bool
    sharded: bool
    """Whether parameters are spread over ranks, so that every forward is collective."""

    def as_table(self) -> dict[str, Any]:
        """The map that travels in ``Hello.topology``."""
        return {
            "data_parallel_rank": self.rank,
            "data_parallel_size": self.world_size,
            "local_rank": self.local_rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "wrapper": self.wrapper,
            "compiled": self.compiled,
        }


def read_topology(model: nn.Module) -> Topology:
    """What the process group, the environment and the model's wrappers say; reads no device tensor."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if initialized else _number("RANK", 0)
    world_size = torch.distributed.get_world_size() if initialized else _number("WORLD_SIZE", 1)
    names = [_WRAPPERS[type(m).__name__] for m in model.modules() if type(m).__name__ in _WRAPPERS]
    wrapper = next((name for name in names if name != "compile"), "none")
    if wrapper == "none" and any(type(p).__name__ == "DTensor" for p in model.parameters()):
        wrapper = "fsdp2"
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0),
        wrapper=wrapper,
        compiled="compile" in names or getattr(unwrapped(model), "_compiled_call_impl", None) is not None,
        sharded=wrapper in {"fsdp1", "fsdp2"} or _is_zero_3(model),
    )


def _is_zero_3(model: nn.Module) -> bool:
    return any(hasattr(p, "ds_id") for p in model.parameters())


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
