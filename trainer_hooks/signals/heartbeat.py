"""A few weights, the same at every step: whether the optimizer's steps change them, and replicas stay alike."""

from __future__ import annotations

import zlib
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.protocol.limits import MAX_HEARTBEAT_WEIGHTS
from sidestep.trainer_hooks.meshes import is_distributed
from sidestep.trainer_hooks.parameters import named_parameters, share_of

_PARAMETERS = 16
_UNGROUPED = 4
"""How many of them are of no group of the optimizer, where there are such: another one may move them, or nobody."""
_GOLDEN = 0.6180339887498949
"""Parameters come in blocks that are alike: multiples of it, modulo 1, fall on other places in each."""
_LOOK_EVERY = 10
"""Steps between two looks at whether these are still the model's parameters."""
_WEIGHTS_EACH = MAX_HEARTBEAT_WEIGHTS // _PARAMETERS


class Heartbeat:
    """Eight weights of each of sixteen trainable parameters, spread over the model; one small copy a step."""

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        """Choose the weights; ``take`` chooses again where parameters were replaced or froze."""
        self._model = model
        self._optimizer = optimizer
        self._chosen: list[tuple[nn.Parameter, Tensor, int]] = []
        self._takes = 0
        self.digest = 0
        """Which weights these are."""
        self.num_ungrouped = 0
        """How many of them, the last ones, are of parameters that the optimizer has in no group."""

    def take(self) -> Tensor | None:
        """Return the weights of now, float32 [h] on their device; None where nothing is trained or kept in shares."""
        self._takes += 1
        if (self._takes - 1) % _LOOK_EVERY == 0 and not self._stands():
            self._choose()
        if not self._chosen:
            return None
        return torch.cat([view for _, view, _ in self._chosen]).to(torch.float32)  # a copy in any case

    def _stands(self) -> bool:
        return bool(self._chosen) and all(
            parameter.requires_grad and _memory(parameter) == memory for parameter, _, memory in self._chosen
        )

    def _choose(self) -> None:
        """Choose by name: ranks that list their parameters in other orders have the same weights compared."""
        trained = [
            (name, parameter)
            for name, parameter in sorted(named_parameters(self._model), key=itemgetter(0))
            if parameter.requires_grad and _local(parameter).numel() >= _WEIGHTS_EACH and parameter.is_floating_point()
        ]
        kinds = {(_local(parameter).device, _local(parameter).dtype) for _, parameter in trained}
        if len(kinds) > 1:  # one copy serves one device and dtype: the most frequent
            common = max(kinds, key=lambda kind: sum((_local(p).device, _local(p).dtype) == kind for _, p in trained))
            trained = [each for each in trained if (_local(each[1]).device, _local(each[1]).dtype) == common]
        grouped = {id(p) for group in getattr(self._optimizer, "param_groups", ()) for p in group["params"]}
        own = [each for each in trained if id(each[1]) in grouped]
        others = [each for each in trained if id(each[1]) not in grouped] if own else []
        chosen = _spread(own or trained, _PARAMETERS - min(_UNGROUPED, len(others))) + _spread(others, _UNGROUPED)
        self._chosen = [(parameter, _middle(parameter), _memory(parameter)) for _, parameter in chosen]
        self.num_ungrouped = min(_UNGROUPED, len(others)) * _WEIGHTS_EACH
        names = ",".join(_described(name, parameter) for name, parameter in chosen)
        self.digest = zlib.crc32(names.encode("utf-8"))


def _spread(parameters: list[tuple[str, nn.Parameter]], number: int) -> list[tuple[str, nn.Parameter]]:
    """Return at most ``number`` of them from all over the list, in its order."""
    size = len(parameters)
    if size <= number:
        return parameters
    places: list[int] = []
    turn = 0
    while len(places) < number:
        place = int(((turn + 0.5) * _GOLDEN) % 1.0 * size)
        turn += 1
        if place not in places:
            places.append(place)
    return [parameters[place] for place in sorted(places)]


def _described(name: str, parameter: nn.Parameter) -> str:
    """Which share this is: other ranks' weights are compared with it only where it is theirs too."""
    shape, offset = share_of(parameter)
    return f"{name}:{shape}@{offset}" if is_distributed(parameter) else f"{name}:{shape}"


def _local(parameter: Any) -> Tensor:
    """This rank's share; of a DTensor without an operation on it."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach()


def _memory(parameter: nn.Parameter) -> int:
    """Which memory the share lies in: another one when the trainer or a wrapper has replaced it."""
    return int(_local(parameter).untyped_storage()._cdata)  # noqa: SLF001  (of tensors without memory too: fake ones)


def _middle(parameter: nn.Parameter) -> Tensor:
    """A view of a few weights in the middle of a parameter; of one that is not contiguous, of its first row."""
    local = _local(parameter)
    flat = local.view(-1) if local.is_contiguous() else local.select(0, 0).reshape(-1)
    return flat.narrow(0, (flat.shape[0] - min(_WEIGHTS_EACH, flat.shape[0])) // 2, min(_WEIGHTS_EACH, flat.shape[0]))
