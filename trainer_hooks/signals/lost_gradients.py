"""Gradients that are gone when the next micro-batch comes: ``zero_grad`` within the accumulation, not before it.

What is looked at is whether a few parameters have a gradient, on the host, and at most once a micro-batch. That none
has one before the second forward of a step is no proof: two forwards may share a backward. So where it is seen, a hook
on these parameters tells, for the steps that follow, whether a backward was there in between.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from sidestep.trainer_hooks.meshes import is_distributed
from sidestep.trainer_hooks.parameters import named_parameters

_PARAMETERS: Final = 8
_TRIALS: Final = 3
"""Steps that are looked at with hooks before two forwards of a step are taken to share a backward."""
_LOOK_EVERY: Final = 100
"""Steps between two choices of parameters where none of those chosen gets a gradient."""
_KEPT_ELSEWHERE: Final = ("main_grad", "grad_sample", "summed_grad")
"""Attributes in which gradients are summed on purpose: Megatron's, and those of differentially private training."""


class LostGradients:
    """Counts the micro-batches of a step at which the gradients of those before had vanished."""

    def __init__(self, model: nn.Module, *, is_sharded: bool) -> None:
        """Look at nothing yet; at nothing ever where parameters are kept in shares, whose gradients come and go."""
        self._model = model
        self._is_done = is_sharded
        self._chosen: list[nn.Parameter] = []
        self._chosen_for = 0  # steps since
        self._handles: list[Any] = []
        self._trials = _TRIALS
        self._versions: list[int] = []
        self._has_accumulated = False
        self._begin_step()

    def _begin_step(self) -> None:
        self._place = -1  # of the newest micro-batch
        self._is_suspected = self._has_arrived = self._is_updated = False
        self._lost = 0

    def micro_batch(self, place: int) -> None:
        """See that a micro-batch's backward is still to come; one that is told twice counts once."""
        if self._is_done or place == self._place:
            return
        self._place = place
        if place > 0:
            if not self._chosen:
                self._choose()
            if self._chosen and all(parameter.grad is None for parameter in self._chosen):
                self._is_suspected = True
                self._lost += self._are_thrown_away()
        self._has_accumulated = False
        self._versions = self._versions_now() if self._handles else []

    def before_update(self) -> None:
        """See which gradients the update is made of: where there are none now, they are kept elsewhere."""
        self._is_updated = True
        self._has_arrived = any(parameter.grad is not None for parameter in self._chosen)

    def take(self) -> int:
        """End the step; returns how many of its micro-batches found the gradients gone."""
        lost = self._lost if self._has_arrived else 0
        if self._is_suspected and self._has_arrived:
            self._look_closer(is_found=lost > 0)
        elif self._handles and self._has_arrived and self._place > 0:
            self.remove()  # it accumulates as it should
        self._chosen_for += 1
        if self._place > 0 and self._is_updated and not self._has_arrived and self._chosen_for >= _LOOK_EVERY:
            self.remove()
            self._chosen = []
        self._begin_step()
        return lost

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._trials = [], _TRIALS

    def _look_closer(self, *, is_found: bool) -> None:
        if not self._handles:
            self._handles = [
                parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
                for parameter in self._chosen
                if parameter.requires_grad
            ]
        elif is_found:
            self._trials = _TRIALS
        else:
            self._trials -= 1
            if self._trials <= 0:
                self.remove()
                self._is_done = True

    def _accumulated(self, _parameter: Tensor) -> None:
        self._has_accumulated = True

    def _are_thrown_away(self) -> bool:
        """Whether a backward left gradients that nobody keeps; where weights moved since (SAM), none are to add up."""
        return (
            self._has_accumulated
            and self._versions == self._versions_now()
            and not any(hasattr(parameter, name) for parameter in self._chosen for name in _KEPT_ELSEWHERE)
        )

    def _versions_now(self) -> list[int]:
        return [parameter._version for parameter in self._chosen]  # noqa: SLF001  (no public one)

    def _choose(self) -> None:
        trained = [
            parameter
            for _, parameter in named_parameters(self._model)
            if parameter.requires_grad and parameter.is_leaf and parameter.numel() and not is_distributed(parameter)
        ]
        stride = max(1, len(trained) / _PARAMETERS)
        self._chosen = [trained[int(place * stride)] for place in range(min(_PARAMETERS, len(trained)))]
        self._chosen_for = 0
