"""Norms by module, of gradients and of weights: cheap enough for every few steps, for detectors and not for charts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sidestep.trainer_hooks.reductions.host_index import to_device


def module_norms(
    held: Sequence[tuple[int, Tensor]], num_modules: int, scale: Tensor | float | None = None
) -> Tensor | None:
    """Return the norm of each module's local tensors together; float32 [modules], -1 for modules without one.

    Args:
        held: module and tensor, a DTensor standing for this rank's share; those on other devices than the first one's
            are left out.
        num_modules: modules of the parameter table.
        scale: the GradScaler's factor that gradients still carry.
    """
    local = [(module, _local(tensor)) for module, tensor in held]
    local = [(module, tensor) for module, tensor in local if tensor.numel()]
    if not local:
        return None
    device = local[0][1].device
    local = [(module, tensor) for module, tensor in local if tensor.device == device]
    with torch.no_grad():
        norms = torch.stack(_norms([tensor for _, tensor in local]))
        owners = to_device(np.array([module for module, _ in local], np.int64), device)
        # Scaled by the largest, so that no square overflows; a NaN or an infinity stays one.
        largest = norms.max()
        safe = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
        squares = torch.zeros(num_modules, dtype=torch.float32, device=device)
        squares.index_add_(0, owners, (norms / safe).square())
        made = squares.sqrt() * safe
        if scale is not None:
            made /= scale.to(device, non_blocking=True).reshape(()) if isinstance(scale, Tensor) else scale
        present = torch.zeros_like(made).index_fill_(0, owners, 1.0)
        return torch.where(present > 0, made, -1.0)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norm of each in float32: by one launch for all on a device, one by one on the CPU, where that is as fast."""
    if tensors[0].is_cuda:
        norms: tuple[Tensor, ...] = torch._foreach_norm(tensors, 2, dtype=torch.float32)  # noqa: SLF001  (no public one)
        return list(norms)
    return [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]


def whole_norm(norms: Tensor) -> Tensor:
    """Return the norm of all modules together; float32 [1]."""
    whole: Tensor = torch.linalg.vector_norm(norms.clamp(min=0.0))
    return whole.reshape(1)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()
