"""What the benchmarks run on: the machine, its device, the versions, the commit."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.turns import machine

PACKAGES = (
    "sidestep", "torch", "triton", "numpy", "pyzmq", "msgpack", "wandb", "trackio", "tensorboard", "tokenizers",
    "transformers",
)  # fmt: skip
_NO_PART_OF_A_NAME = re.compile(r"\d+gb|hbm\d*e?|sxm\d*|pcie|nvl")
"""Words of a device's name that say how it is built, not which it is."""
_PROBE = """
import json, torch
if torch.cuda.is_available():
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    print(json.dumps({"device": found.name, "device_bytes": found.total_memory}))
"""
_PROBE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the parts of the suite can count on."""

    quick: bool
    """Whether it is only to be shown that everything runs."""
    hardware: str
    """Architecture and cores."""
    processor: str
    """Its name."""
    cores: int
    """Cores of the machine."""
    usable_cores: int
    """Cores that this process may run on."""
    python: str
    """Its version."""
    load_before: float
    """The load average over a minute, when the suite began."""
    device: str = ""
    """The CUDA device's name; empty where there is none."""
    device_bytes: int = 0
    """The CUDA device's memory."""
    commit: str = ""
    """The commit of this folder, with a ``+`` where tracked files differ from it; empty where there is none."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package to version, of those installed."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it for a file."""
        return asdict(self)

    def name(self) -> str:
        """Return the hardware as a part of a file's name: ``nvidia-h100``, ``cpu-2-cores``."""
        if not self.device:
            return f"cpu-{self.cores}-cores"
        words = re.findall(r"[a-z0-9]+", self.device.lower())
        return "-".join(word for word in words if not _NO_PART_OF_A_NAME.fullmatch(word))


def surroundings(root: Path, *, quick: bool) -> Surroundings:
    """Look at this machine, and at the checkout at ``root``; raises RuntimeError where torch cannot be asked."""
    return Surroundings(
        quick=quick,
        **machine(),
        **_device(),
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)),
        commit=commit_of(root),
        versions={name: found for name in PACKAGES if (found := _version(name))},
    )


def is_installed(package: str) -> bool:
    """Return whether this Python finds a package, without importing it."""
    return importlib.util.find_spec(package) is not None


def commit_of(root: Path) -> str:
    """Return a checkout's short commit, with a ``+`` where tracked files were changed; empty where there is none."""
    commit = _git(root, "rev-parse", "--short", "HEAD")
    return commit + ("+" if commit and _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""  # no git here: the page says so
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _device() -> dict[str, Any]:
    """Ask another process, which gives the device back when it ends.

    Raises:
        RuntimeError: torch is there and cannot be asked.
    """
    if not is_installed("torch"):
        return {}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"torch cannot say whether there is a CUDA device:\n{done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found
