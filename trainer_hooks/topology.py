"""Which rank this is, how the model is wrapped, and which batches and parameters are this rank's alone."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sidestep.trainer_hooks.meshes import (
    DataPlace,
    MeshShape,
    fsdp_place,
    group_place,
    largest_mesh,
    mesh_shape,
    tensor_parallel_place,
)
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
    """``none``, ``ddp``, ``dp``, ``fsdp1``, ``fsdp2``, ``hsdp``, ``replicate``, ``tp``, ``deepspeed``; ``+tp`` where
    parameters are spread by tensor parallelism as well."""
    compiled: bool
    sharded: bool
    """Whether parameters are spread over ranks, so that every forward is collective."""
    data: DataPlace | None = None
    """Whose batches this rank sees and which copy of the parameters it shares in; None: its own, a copy a rank."""
    mesh: MeshShape | None = None
    """The mesh that parameters are spread over."""

    @property
    def data_rank(self) -> int:
        """Ranks with the same one see the same batches."""
        return self.rank if self.data is None else self.data.rank

    @property
    def data_size(self) -> int:
        """Ranks that see batches of their own."""
        return self.world_size if self.data is None else self.data.size

    @property
    def copy(self) -> int:
        """Which copy of the parameters this rank holds all or a share of; copy 0 is reported."""
        return self.rank if self.data is None else self.data.copy

    @property
    def num_shares(self) -> int:
        """Ranks that hold one copy between them."""
        return max(1, self.world_size // (self.world_size if self.data is None else self.data.num_copies))

    def as_table(self) -> dict[str, Any]:
        """The map that travels in ``Hello.topology``."""
        table: dict[str, Any] = {
            "data_parallel_rank": self.data_rank,
            "data_parallel_size": self.data_size,
            "copy": self.copy,
            "shares": self.num_shares,
            "local_rank": self.local_rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "wrapper": self.wrapper,
            "compiled": self.compiled,
        }
        if self.mesh is not None:
            table["mesh"] = {
                "names": list(self.mesh.names),
                "shape": list(self.mesh.shape),
                "coordinate": list(self.mesh.coordinate),
            }
        return table


def read_topology(model: nn.Module) -> Topology:
    """What the process group, the environment and the model's wrappers say; reads no device tensor."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if initialized else _number("RANK", 0)
    world_size = torch.distributed.get_world_size() if initialized else _number("WORLD_SIZE", 1)
    found = {_WRAPPERS[type(m).__name__]: m for m in model.modules() if type(m).__name__ in _WRAPPERS}
    mesh = largest_mesh(model)
    wrapper = next((name for name in found if name != "compile"), "none")
    by_fsdp = fsdp_place(model) if initialized else None
    data = by_fsdp or (_data_place(found, wrapper, mesh, world_size) if initialized else None)
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0),
        wrapper=_named(wrapper, by_fsdp, mesh),
        compiled="compile" in found or getattr(unwrapped(model), "_compiled_call_impl", None) is not None,
        sharded=wrapper == "fsdp1" or mesh is not None or _is_zero_3(model),
        data=data,
        mesh=mesh_shape(mesh),
    )


def _data_place(found: dict[str, nn.Module], wrapper: str, mesh: Any, world_size: int) -> DataPlace | None:
    if wrapper == "ddp" and getattr(found["ddp"], "process_group", None) is not None:
        return group_place(found["ddp"].process_group)
    return tensor_parallel_place(mesh, world_size) if wrapper == "none" and mesh is not None else None


def _named(wrapper: str, by_fsdp: DataPlace | None, mesh: Any) -> str:
    """The wrapper's name; FSDP2 wraps nothing and is told by what it has done to the modules."""
    if by_fsdp is not None and wrapper == "none":
        is_cut_further = mesh is not None and mesh.size() > by_fsdp.size
        return f"{by_fsdp.wrapper}+tp" if is_cut_further else by_fsdp.wrapper
    if mesh is None:
        return wrapper
    return "tp" if wrapper == "none" else f"{wrapper}+tp"


def _is_zero_3(model: nn.Module) -> bool:
    return any(hasattr(p, "ds_id") for p in model.parameters())


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
