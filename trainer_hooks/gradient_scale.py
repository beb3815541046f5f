"""The factor that gradients carry under a GradScaler, as a tensor to be shipped: it is never read here."""

from __future__ import annotations

from typing import Any

import torch


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
