"""How many updates the optimizer's own state counts: it falls where a state is lost, as in a resume without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_COUNT = "step"
"""Key of the count in a parameter's state: that of torch's Adam family, and of those that are modelled on it."""
_MAPPINGS = (dict, Mapping)
"""The common kind first: among cold caches it is dear to ask for the other."""


class OptimizerSteps:
    """Looks at the same parameter of each group every time: another one may have begun to be trained later."""

    def __init__(self, optimizer: Any) -> None:
        """Look at nothing yet; the first parameter that has a state is taken."""
        self._optimizer = optimizer
        self._places: dict[int, int] = {}  # group to the place of its parameter in it

    def take(self) -> Tensor | list[float] | None:
        """Return the count of a parameter with a state of each group, -1 where none has one.

        Numbers where the counts lie on the host. No device is read: of counts there, float64 [groups] on it. None where
        no group has one, and where they lie on several devices.
        """
        state = getattr(self._optimizer, "state", None)
        if not isinstance(state, _MAPPINGS):
            return None
        groups = self._optimizer.param_groups
        counts = [self._count(state, number, group["params"]) for number, group in enumerate(groups)]
        on_device = [count for count in counts if isinstance(count, Tensor)]
        if not any(count is not None for count in counts) or len({count.device for count in on_device}) > 1:
            return None
        if all(count.is_cpu for count in on_device):
            return [-1.0 if count is None else float(count) for count in counts]
        device = on_device[0].device
        return torch.stack([_placed(count, device) for count in counts])

    def _count(self, state: Mapping[Any, Any], number: int, parameters: list[Any]) -> Tensor | float | None:
        """The state may be a defaultdict, which asking would fill: so it is only looked into."""
        place = self._places.get(number, -1)
        found = state.get(parameters[place]) if 0 <= place < len(parameters) else None
        if found is None:
            place = next((place for place, parameter in enumerate(parameters) if parameter in state), -1)
            if place < 0:
                return None
            self._places[number] = place
            found = state[parameters[place]]
        count = found.get(_COUNT) if isinstance(found, _MAPPINGS) else None
        if isinstance(count, Tensor):
            return count if count.numel() == 1 and not hasattr(count, "to_local") else None
        return float(count) if isinstance(count, int | float) else None


def _placed(count: Tensor | float | None, device: torch.device) -> Tensor:
    if isinstance(count, Tensor):
        return count.detach().reshape(()).to(torch.float64, copy=True)
    return torch.full((), -1.0 if count is None else count, dtype=torch.float64, device=device)
