"""Whether a reduction runs as a kernel or as other operations: the same results, and never an error to the loop.

``SIDESTEP_KERNELS`` says ``auto`` (the default: Triton's where there is a CUDA device and Triton, the host's where
there is a C compiler), ``triton`` (also in Triton's interpreter, for tests) or ``torch``. What fails once runs as
operations of torch and numpy from then on.
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
from sidestep.trainer_hooks.kernels import host_build
from sidestep.trainer_hooks.kernels.host_launch import host_kernel

HOST_GRADIENT = "host gradient"
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
    """Return why no kernel of Triton's runs on a device; empty where they do.

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


def host_obstacle() -> str:
    """Return why the host's kernel does not run; empty where it does.

    Raises:
        ValueError: ``SIDESTEP_KERNELS`` has a value that there is not.
    """
    value = told()
    return host_build.obstacle() if value == "auto" else f"{VARIABLE} is {value}"


def stated(device: torch.device) -> str:
    """Return the choice for a device in words, as ``Hello`` carries it; loads nothing.

    Raises:
        ValueError: ``SIDESTEP_KERNELS`` has a value that there is not.
    """
    reason = obstacle(device)
    if reason and device.type == "cpu":
        reason = host_obstacle()
        chosen = host_build.instructions()
        return f"torch ({reason})" if reason or chosen is None else f"compiled for {chosen.name}"
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
        self._obstacles: dict[tuple[torch.device | None, str, str], str] = {}
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
        return not self._known_obstacle(device)

    def begin_on_host(self) -> None:
        """See to it that the host's kernel is there some time, where it can be; returns at once."""
        if not self._known_obstacle(None):
            host_kernel.begin()

    def can_run_on_host(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether the host's kernel takes these tensors; where it is still being made, it does not yet."""
        if self.failures[HOST_GRADIENT] or self._known_obstacle(None):
            return False
        host_kernel.begin()
        return host_kernel.is_settled and all(type(each) is Tensor for each in tensors)

    def _known_obstacle(self, device: torch.device | None) -> str:
        """Return what stands against Triton's kernels on a device, or (None) against the host's."""
        environment = os.environ
        key = device, environment.get(VARIABLE, ""), environment.get("TRITON_INTERPRET", "")
        if key not in self._obstacles:
            self._obstacles[key] = host_obstacle() if device is None else obstacle(device)
        return self._obstacles[key]

    def attempt(self, name: str, call: Callable[[], Result]) -> Result | None:
        """Run a kernel; None where it cannot: then it is not tried again, and that is said once."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001  (a compiler may raise anything; counted and said, torch does it)
            self.failures[name] += 1
            text = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:300]
            self._console.once(
                f"kernel-{name}",
                f"the {name} kernel cannot run here ({text}); other operations do the same, in more time.",
            )
            return None


kernels = Kernels()
"""This process's."""
