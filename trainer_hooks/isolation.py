"""A forward pass that leaves no trace in the training: modes, random state, autocast and compilation put back."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

MAX_BUFFER_BYTES = 1 << 20
"""Buffers up to this size are put back after a forward in training mode: counts and averages are far smaller."""
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional"})


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, autocast or compiled code; everything is put back, whatever is raised within.

    Every sub-module returns to its own mode (a frozen encoder in evaluation mode stays so), and the random state of
    torch (CPU and the CUDA devices in use), numpy and ``random`` is what it was (docs/metrics.md, ``generation/``).
    """
    with ExitStack() as stack:
        stack.enter_context(_random_state())
        stack.enter_context(_evaluation(model))
        stack.enter_context(_eager())
        for device_type in _device_types(model):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


Autocast = Sequence[tuple[str, bool, torch.dtype]]
"""Of each type of device whether autocast is on, and its dtype."""


def autocast_now(model: nn.Module) -> Autocast:
    """Return the autocast that is on now, for the host and the model's devices."""
    return [(each, torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in _device_types(model)]


@contextmanager
def as_trained(model: nn.Module, autocast: Autocast) -> Iterator[None]:
    """Every module in its own mode and under the training's autocast, but without gradients or compiled code.

    What is wrong in training mode alone shows here alone (a mask that only the training's kernel lacks). No trace is
    left: layers that gather statistics of their inputs (batch normalisation) are in evaluation mode, buffers up to
    ``MAX_BUFFER_BYTES`` that changed are put back, and the random state is what it was, so that what dropout drops is
    the same in two of these in a row. In a process group a collective raises: the others would not take part.

    Raises:
        RuntimeError: the model called a collective.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what checkpointing says where there are no gradients
        stack.enter_context(_random_state())
        stack.enter_context(_evaluation(model, only=_NormBase))
        stack.enter_context(_same_buffers(model))
        stack.enter_context(_eager())
        for device_type, enabled, dtype in autocast:
            # Without its cache: weights that were cast without gradients would go on into a training forward.
            stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False))
        stack.enter_context(torch.no_grad())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            stack.enter_context(NoCollectives())  # type: ignore[no-untyped-call]
        yield


class NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises before a collective is launched: of one rank alone it would wait for the others for ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything else pass."""
        if getattr(func, "namespace", "") in _COLLECTIVES:
            raise RuntimeError(f"the model's forward calls the collective {func}, which one rank alone cannot")
        return func(*args, **(kwargs or {}))


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Put back buffers that are changed in place or exchanged; told by their version, without reading them."""
    tables = [module._buffers for module in model.modules()]  # noqa: SLF001  (their places; None where one is yet to be)
    held = [(buffers, name, _Held.of(buffer)) for buffers in tables for name, buffer in buffers.items()]
    try:
        yield
    finally:
        for buffers, name, kept in held:
            kept.put_back()
            buffers[name] = kept.buffer


@dataclass(frozen=True, slots=True)
class _Held:
    buffer: Any
    copy: torch.Tensor | None
    version: int

    @classmethod
    def of(cls, buffer: Any) -> Self:
        if buffer is None or buffer.is_inference() or buffer.nbytes > MAX_BUFFER_BYTES:
            return cls(buffer, None, 0)
        return cls(buffer, buffer.detach().clone(), buffer._version)  # noqa: SLF001  (torch tells it by nothing else)

    def put_back(self) -> None:
        if self.copy is not None and self.buffer._version != self.version:  # noqa: SLF001
            with torch.no_grad():
                self.buffer.copy_(self.copy)


def _device_types(model: nn.Module) -> list[str]:
    return sorted({p.device.type for p in model.parameters()} | {"cpu"})


@contextmanager
def _evaluation(model: nn.Module, only: type[nn.Module] = nn.Module) -> Iterator[None]:
    """Set each module's mode by its attribute: an overridden ``train()`` may do more (merge adapters, say)."""
    modes = [(module, module.training) for module in model.modules() if isinstance(module, only)]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _random_state() -> Iterator[None]:
    cpu = torch.get_rng_state()
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if in_use else []
    of_numpy: Any = np.random.get_state()  # noqa: NPY002  (the global generator is what a trainer may be using)
    of_python = random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


@contextmanager
def _eager() -> Iterator[None]:
    """No compiled code runs and none is made: a probe through a compiled model would make its graph dynamic."""
    stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6 and later
    if stance is None:
        yield
        return
    with stance("force_eager"):
        yield
