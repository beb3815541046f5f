"""Distributed tensors and device meshes, read without an operation on any of them.

An operation on a DTensor may be a collective, and ``item()`` of one with a partial placement silently gives the local
value (docs/trainer.md, section 2). So what is looked at here is placements, coordinates and local tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_STAGES = ("pp", "pipe", "stage")
"""How the names of mesh dimensions begin along which the model's layers are divided: no batch is divided there."""


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def is_partial(tensor: Any) -> bool:
    """Whether its values are terms of a sum over ranks, which no rank has."""
    return any(placement.is_partial() for placement in tensor.placements)


def whole_or_none(tensor: Tensor) -> Tensor | None:
    """The tensor's values where this rank has all of them: a plain one itself, of copies the local one."""
    if not is_distributed(tensor):
        return tensor
    distributed: Any = tensor
    if not all(placement.is_replicate() for placement in distributed.placements):
        return None
    local: Tensor = distributed.to_local()
    return local


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlace:
    """Which batches a rank sees, and which copy of the parameters it holds a share of."""

    rank: int
    """Ranks with the same number see the same batches (tensor-parallel copies, pipeline stages)."""
    size: int
    """How many such numbers there are."""
    copy: int
    """Which copy of the parameters; only shares of copy 0 are reported."""
    num_copies: int
    wrapper: str = ""
    """What arranged it, where that is FSDP2: ``fsdp2``, ``hsdp`` or ``replicate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """A device mesh, and where this rank is on it."""

    names: tuple[str, ...]
    """Of its dimensions, or empty."""
    shape: tuple[int, ...]
    coordinate: tuple[int, ...]

    def place(self, beside: tuple[str, ...] = (), *, copies: CopyDimension | None) -> tuple[int, ...]:
        """This rank's coordinates within its copy of the model, those of dimensions named in ``beside`` left out."""
        names = self.names or ("",) * len(self.shape)
        return tuple(
            coordinate
            for index, (name, coordinate) in enumerate(zip(names, self.coordinate, strict=True))
            if not (name and name in beside) and not (copies is not None and copies.is_at(index, name))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyDimension:
    """The dimension of a mesh along which whole copies of the model lie (HSDP, ``replicate``)."""

    index: int
    name: str

    def is_at(self, index: int, name: str) -> bool:
        """Whether a dimension is this one: by its name where it has one."""
        return name == self.name if self.name and name else index == self.index


def largest_mesh(model: nn.Module) -> Any:
    """The mesh of the parameter that is spread over most dimensions; None where all are plain."""
    meshes = [parameter.device_mesh for parameter in _spread(model)]
    return max(meshes, key=lambda mesh: (mesh.ndim, mesh.size()), default=None)


def _spread(model: nn.Module) -> Iterator[Any]:
    return (parameter for parameter in model.parameters() if is_distributed(parameter))


def mesh_shape(mesh: Any) -> MeshShape | None:
    """A mesh in plain numbers; None without a mesh, or where this rank is not on it."""
    coordinate = mesh.get_coordinate() if mesh is not None else None
    if coordinate is None:
        return None
    return MeshShape(
        names=tuple(mesh.mesh_dim_names or ()),
        shape=tuple(int(size) for size in mesh.shape),
        coordinate=tuple(int(place) for place in coordinate),
    )


def fsdp_place(model: nn.Module) -> DataPlace | None:
    """What FSDP2 (or ``replicate`` on its machinery) says of the module with most ranks; None where there is none."""
    infos = [info for module in model.modules() for info in _mesh_infos(module)]
    places = [_place_by(info) for info in infos]
    return max(places, key=lambda place: place.size, default=None)


def copy_dimension(model: nn.Module) -> CopyDimension | None:
    """Along which dimension FSDP2 keeps copies; None where it keeps one."""
    for module in model.modules():
        for info in _mesh_infos(module):
            index = getattr(info, "replicate_mesh_dim", None)
            if index is not None:
                names = info.mesh.mesh_dim_names
                return CopyDimension(index=index, name=names[index] if names else "")
    return None


def _mesh_infos(module: nn.Module) -> list[Any]:
    """The ranks' arrangement of a module's parameter groups; the names differ between versions of torch."""
    read_state = getattr(module, "_get_fsdp_state", None)
    if not callable(read_state):
        return []
    state: Any = read_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [info for group in groups if (info := getattr(group, "mesh_info", None)) is not None]


def _place_by(info: Any) -> DataPlace:
    num_shares, share = getattr(info, "shard_mesh_size", 1), getattr(info, "shard_mesh_rank", 0)
    num_copies, copy = getattr(info, "replicate_mesh_size", 1), getattr(info, "replicate_mesh_rank", 0)
    is_copied, is_cut = (getattr(info, f"{kind}_mesh_dim", None) is not None for kind in ("replicate", "shard"))
    return DataPlace(
        rank=copy * num_shares + share,
        size=num_copies * num_shares,
        copy=copy,
        num_copies=num_copies,
        wrapper="hsdp" if is_copied and is_cut else "replicate" if is_copied else "fsdp2",
    )


def tensor_parallel_place(mesh: Any, world_size: int) -> DataPlace:
    """Where nothing else divides the batch: ranks of one tensor-parallel mesh see the same one.

    The dimensions of the root mesh beside it are data-parallel ones, those of pipeline stages left out.
    """
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else None  # noqa: SLF001  (no public way)
    whole, part = mesh_shape(root), mesh_shape(mesh)
    if whole is None or part is None or not whole.names or not part.names:
        size = max(1, world_size // mesh.size())
        place = int(mesh.mesh.min()) // mesh.size()
        return DataPlace(rank=place, size=size, copy=place, num_copies=size)
    place, size = 0, 1
    for name, length, coordinate in zip(whole.names, whole.shape, whole.coordinate, strict=True):
        if name not in part.names and not name.lower().startswith(_STAGES):
            place, size = place * length + coordinate, size * length
    return DataPlace(rank=place, size=size, copy=place, num_copies=size)


def group_place(group: Any) -> DataPlace:
    """The ranks of a process group each see a batch and hold a copy of their own (DistributedDataParallel)."""
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return DataPlace(rank=rank, size=size, copy=rank, num_copies=size)


def holds_first(parameter: Any, largest: MeshShape | None, copies: CopyDimension | None = None) -> bool:
    """Whether no rank before this one, within its copy of the model, holds the same share of a parameter.

    Args:
        parameter: plain or distributed.
        largest: the mesh that the model's parameters are spread over.
        copies: its dimension along which copies of the model lie.
    """
    if largest is None:
        return True
    if not is_distributed(parameter):
        return not any(largest.place(copies=copies))
    mesh = mesh_shape(parameter.device_mesh)
    if mesh is None:
        return False
    names = mesh.names or ("",) * len(mesh.shape)
    for index, (placement, coordinate) in enumerate(zip(parameter.placements, mesh.coordinate, strict=True)):
        if coordinate and placement.is_replicate() and not (copies is not None and copies.is_at(index, names[index])):
            return False
    return len(mesh.shape) >= len(largest.shape) or not any(largest.place(mesh.names, copies=copies))
