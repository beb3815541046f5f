"""Whether a reduction runs as a kernel or as operations of torch: the same results, and never an error to the loop.

``SIDESTEP_KERNELS`` says ``auto`` (the default: where there is a CUDA device and Triton), ``triton`` (also in Triton's
interpreter, for tests) or ``torch``. What fails once runs as operations of torch from then on.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch
from torch import Tensor

from sidestep.trainer_hooks.console import Console

VARIABLE = "SIDESTEP_KERNELS"
CHOICES = ("auto", "triton", "torch")

Result = TypeVar("Result")


def told() -> str:
    """Return what the environment says.

    Raises:
        ValueError: it is none of ``CHOICES``.
    """
    value = os.environ.get(VARIABLE, "") or CHOICES[0]
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, not {value!r}")
    return value


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in {"", "0", "false", "False"}


def obstacle(device: torch.device) -> str:
    """Return why no kernel runs on a device; empty where kernels do.

    Raises:
        ValueError: ``SIDESTEP_KERNELS`` has a value that there is not.
    """
    value = told()
    if value == "torch":
        return f"{VARIABLE} is torch"
    if device.type != "cuda" and not (value == "triton" and device.type == "cpu" and _is_interpreted()):
        return "no CUDA device"
    if device.type == "cuda" and _is_interpreted():
        return "Triton is in its interpreter"
    if device.type == "cuda" and torch.version.hip is not None:
        return "not a device of NVIDIA's"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def stated(device: torch.device) -> str:
    """Return the choice for a device in words, as ``Hello`` carries it; loads nothing.

    Raises:
        ValueError: ``SIDESTEP_KERNELS`` has a value that there is not.
    """
    reason = obstacle(device)
    if reason:
        return f"torch ({reason})"
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "triton"


class Kernels:
    """The choice as it is made, call by call; one per process, on the training thread."""

    def __init__(self, console: Console | None = None) -> None:
        """Say what fails to ``console``."""
        self._console = console or Console()
        self._obstacles: dict[tuple[torch.device, str, str], str] = {}
        self.failures: Counter[str] = Counter()
        """Kernels that raised, by name: each is tried once."""

    def can_run(self, name: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
        """Tell whether a kernel takes these tensors, the first of which says where."""
        if not tensors or self.failures[name]:
            return False
        device = tensors[0].device
        # Subclasses (fake, distributed, functional tensors) have no memory of their own to point at.
        if any(type(each) is not Tensor or each.device != device or each.dtype not in dtypes for each in tensors):
            return False
        environment = os.environ
        key = device, environment.get(VARIABLE, ""), environment.get("TRITON_INTERPRET", "")
        if key not in self._obstacles:
            self._obstacles[key] = obstacle(device)
        return not self._obstacles[key]

    def attempt(self, name: str, call: Callable[[], Result]) -> Result | None:
        """Run a kernel; None where it cannot: then it is not tried again, and that is said once."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001  (a compiler may raise anything; counted and said, torch does it)
            self.failures[name] += 1
            text = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:300]
            self._console.once(
                f"kernel-{name}",
                f"the {name} kernel cannot run here ({text}); torch's own operations do the same, in more time.",
            )
            return None


kernels = Kernels()
"""This process's."""
