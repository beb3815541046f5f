"""The factor that gradients carry under a GradScaler, and its flag of an overflow.

On a device both are shipped as they are, and never read there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_FLAG = "overflow"


def carried_scale(optimizer: Any, scaler: Any) -> torch.Tensor | None:
    """The factor that the optimizer's gradients still carry now [], on its device; None where they carry none.

    ``unscale_`` takes it off before the step; an optimizer that unscales in its own kernel has it as ``grad_scale``.
    """
    own = getattr(optimizer, "grad_scale", None)
    if isinstance(own, torch.Tensor):
        return own.detach().clone()
    if scaler is None or not scaler.is_enabled() or is_unscaled(optimizer, scaler):
        return None
    scale = getattr(scaler, "_scale", None)
    return scale.detach().clone() if isinstance(scale, torch.Tensor) else None  # update() changes it in place


def is_unscaled(optimizer: Any, scaler: Any) -> bool:
    """Whether ``scaler.unscale_(optimizer)`` was called in this step (the scaler keeps a stage per optimizer)."""
    states = getattr(scaler, "_per_optimizer_states", {})
    stage = states[id(optimizer)].get("stage") if id(optimizer) in states else None
    return getattr(stage, "name", "READY") != "READY"


def overflow_flag(optimizer: Any) -> torch.Tensor | None:
    """The scaler's flag, not 0 for an overflow, float32 [1], where it leaves it to the optimizer's kernel to obey it.

    Asked for while ``optimizer.step`` runs: a fused optimizer is called with an overflow too, and changes nothing then.
    """
    found = getattr(optimizer, "found_inf", None)
    return found.detach().clone().reshape(1) if isinstance(found, torch.Tensor) else None


def is_known_overflow(flag: torch.Tensor | None) -> bool:
    """Whether a flag on the host says overflow; one on a device is not read."""
    return flag is not None and flag.is_cpu and bool(flag.any())


def with_flag(tensors: Mapping[str, torch.Tensor], flag: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
    """What is to be staged, and the flag beside it."""
    return tensors if flag is None else {**tensors, _FLAG: flag}


def has_overflowed(arrays: Mapping[str, Any]) -> bool:
    """Whether the flag that was staged ``with_flag``, and is on the host now, says overflow."""
    return _FLAG in arrays and bool(arrays[_FLAG].any())
