"""Learning rates of the parameter groups, and what the groups are called (docs/metrics.md, ``lr/``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from sidestep.protocol.messages import LearningRates
from sidestep.trainer_hooks.parameters import ParameterTable, unwrapped

NANOVLM_GROUPS: Mapping[str, str] = {
    "MP": "modality_projector",
    "vision_encoder": "vision_encoder",
    "decoder": "language_model",
}
"""nanoVLM's three modules, and what the spec calls the rate of each."""


def group_names(optimizer: Optimizer, model: nn.Module, table: ParameterTable) -> tuple[str, ...]:
    """Name the parameter groups, in their order; no name occurs twice.

    nanoVLM builds its groups conditionally and gives them no name, so they are known by whose parameters they hold.
    """
    owners = _nanovlm_owners(unwrapped(model))
    names: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        parameters = list(group["params"])
        name = _shared(owners.get(id(each)) for each in parameters)
        name = (
            name or str(group.get("name") or "") or _shared(table.module_of(each) for each in parameters) or str(index)
        )
        names.append(name if name not in names else f"{name}_{index}")
    return tuple(names)


def _nanovlm_owners(model: nn.Module) -> dict[int, str]:
    """Map the identity of each parameter to its group's name, for a model of nanoVLM's make; else nothing."""
    children = {name: getattr(model, name, None) for name in NANOVLM_GROUPS}
    if not all(isinstance(child, nn.Module) for child in children.values()):
        return {}
    return {
        id(parameter): NANOVLM_GROUPS[name]
        for name, child in children.items()
        if isinstance(child, nn.Module)
        for parameter in child.parameters()
    }


def _shared(names: Iterable[str | None]) -> str:
    """Return the one name that all have, or nothing."""
    distinct = set(names)
    only = distinct.pop() if len(distinct) == 1 else None
    return only or ""


def reduce_learning_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Take the groups' rates as they are now, read where they lie.

    Args:
        groups: ``optimizer.param_groups``; each ``lr`` is a float, a tensor of one element (capturable optimizers) or
            nothing (Adafactor with relative steps).

    Returns:
        ``rates``, float64 [groups], on the device of the first rate that lies on one, else on the host; NaN where a
        group has none.
    """
    rates = [_known(group.get("lr")) for group in groups]
    devices = [rate.device for rate in rates if isinstance(rate, Tensor) and rate.device.type != "cpu"]
    if not devices:
        return {"rates": torch.tensor([float(rate) for rate in rates], dtype=torch.float64)}
    return {"rates": torch.stack([_on(rate, devices[0]) for rate in rates])}


def _known(rate: float | Tensor | None) -> float | Tensor:
    return math.nan if rate is None else rate


def _on(rate: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(rate, Tensor):
        return rate.detach().reshape(()).to(device, torch.float64, non_blocking=True)
    return torch.full((), rate, dtype=torch.float64, device=device)


def learning_rates_message(*, step: int, arrays: Mapping[str, NDArray[Any]]) -> LearningRates:
    """Compact what ``reduce_learning_rates`` returned, once it is on the host."""
    return LearningRates(step=step, rates=np.asarray(arrays["rates"], np.float64))
