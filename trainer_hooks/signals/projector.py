"""What the projector gives: whether images still reach the language model, and whether they still differ there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.trainer_hooks.meshes import whole_or_none
from sidestep.trainer_hooks.parameters import unwrapped
from sidestep.trainer_hooks.signals.late_rows import MAX_LATE_BYTES, TOKEN_AXES

PROJECTOR_NAMES = (
    "multi_modal_projector", "modality_projector", "mm_projector", "MP", "projector", "connector", "merger", "aligner",
    "resampler", "perceiver",
)  # fmt: skip
"""Last components of the names that the field gives this module, in the order they are looked for."""


def find_projector(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the model's projector and its name, None where no module is called so or the model is compiled.

    A hook on a module inside a compiled one is never called, or breaks its graph.
    """
    if _is_compiled(model):
        return None
    inner = unwrapped(model)
    if _is_compiled(inner):
        return None
    modules = dict(inner.named_modules())
    for wanted in PROJECTOR_NAMES:
        found = [name for name in modules if name.rpartition(".")[2] == wanted]
        if found:
            name = min(found, key=lambda name: (name.count("."), name))
            return name, modules[name]
    return None


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


class ProjectorWatch:
    """Looks at what the projector gives in training forwards; keeps two numbers per call and no tensor of the model."""

    def __init__(self, module: nn.Module, is_wanted: Callable[[], bool]) -> None:
        """Put a forward hook on ``module``; ``is_wanted`` says whether this forward is one of the training."""
        self._is_wanted = is_wanted
        self._seen: list[Tensor] = []
        self.errors: list[Exception] = []
        """What went wrong, for the guard to count."""
        self._handle = module.register_forward_hook(self._see)

    def _see(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not self._is_wanted():
            return
        try:
            given = output if isinstance(output, Tensor) else next(e for e in output if isinstance(e, Tensor))
            value = whole_or_none(given)
            if value is not None and value.numel():
                is_small = value.is_cpu and value.nbytes <= MAX_LATE_BYTES // 4
                # A small one on the host is copied and looked at later, as a training thread's operations are dear.
                self._seen.append(value.detach().clone() if is_small else projector_numbers(value))
        except Exception as error:  # noqa: BLE001  (counted by the guard; the forward goes on)
            self.errors.append(error)

    def take(self) -> list[Tensor]:
        """Return what was seen since the last call: root mean square and spread [2], or a small output itself."""
        seen, self._seen = self._seen, []
        return seen

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()


def projector_numbers(value: Tensor) -> Tensor:
    """Return root mean square, and root mean square over features of the deviation across images; float32 [2].

    Args:
        value: [images, tokens, features] or [rows, features], any float dtype; of rows the deviation is across them.
    """
    with torch.no_grad():
        rows = value.detach()
        features = rows.shape[-1]
        rms = rows.float().square().mean().sqrt()
        rows = rows.reshape(-1, features) if rows.dim() < TOKEN_AXES else rows.reshape(rows.shape[0], -1, features)
        means = rows.float() if rows.dim() < TOKEN_AXES else rows.float().mean(dim=1)
        spread = (means - means.mean(dim=0, keepdim=True)).square().mean().sqrt()
        # One image alone differs from none: its spread says nothing.
        return torch.stack((rms, spread if means.shape[0] > 1 else torch.full_like(spread, -1.0)))
