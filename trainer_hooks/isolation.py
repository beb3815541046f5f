"""A forward pass that leaves no trace in the training: modes, random state, autocast and compilation put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


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
        device_types = {p.device.type for p in model.parameters()} | {"cpu"}
        for device_type in sorted(device_types):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Set each module's mode by its attribute: an overridden ``train()`` may do more (merge adapters, say)."""
    modes = [(module, module.training) for module in model.modules()]
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
