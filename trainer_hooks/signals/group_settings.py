"""What the optimizer's groups are set to, read on the host: a setting that lies on a device is not known here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Final

from torch import Tensor

from sidestep.protocol.signals import GROUP_SETTINGS

MAX_GROUPS: Final = 16
_PAIR: Final = 2
_SEQUENCES: Final = (tuple, list, Sequence)
_LEARNED_STEP: Final = "d"
"""Key of optimizers with betas that find their rate themselves (D-Adaptation, Prodigy): what they take it times."""


def host_number(value: object) -> float:
    """Return a number that lies on the host, also one in a tensor; NaN for all else: no device is read."""
    if isinstance(value, float | int):
        return float(value)
    if isinstance(value, Tensor):
        is_here = value.is_cpu and value.numel() == 1 and not hasattr(value, "to_local")
        return float(value) if is_here else math.nan
    return float(value) if isinstance(value, Real) else math.nan


def group_settings(optimizer: Any) -> tuple[float, ...]:
    """Return ``GROUP_SETTINGS`` of each group, one after another: of the first 16; empty without groups.

    The momentum of an optimizer without betas stands in the first one's place. Of three betas and more the second is
    no scale of Adam's, and an optimizer that finds its own rate decays by another product: these are not known (NaN).
    """
    groups = getattr(optimizer, "param_groups", ())
    return tuple(number for group in groups[:MAX_GROUPS] for number in _of_group(group))


def _of_group(group: Mapping[str, Any]) -> tuple[float, ...]:
    betas = group.get("betas")
    beta1 = beta2 = math.nan
    if isinstance(betas, _SEQUENCES) and betas:
        beta1 = host_number(betas[0])
        beta2 = host_number(betas[1]) if len(betas) == _PAIR else math.nan
    elif betas is None:
        beta1 = host_number(group.get("momentum"))
    finds_rate = betas is not None and _LEARNED_STEP in group
    decay = math.nan if finds_rate else host_number(group.get("weight_decay"))
    found = {"beta1": beta1, "beta2": beta2, "eps": host_number(group.get("eps")), "weight_decay": decay}
    return tuple(found[name] for name in GROUP_SETTINGS)
