"""Which rank this is, how the model is wrapped, and where the training runs."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

_WRAPPERS = {
    "DistributedDataParallel": "ddp",
    "DataParallel": "dp",
    "FullyShardedDataParallel": "fsdp1",
    "DeepSpeedEngine": "deepspeed",
    "OptimizedModule": "compile",
}
_INNER_NAMES = ("_orig_mod", "module", "_fsdp_wrapped_module")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The place of this process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    wrapper: str
    """``none``, ``ddp``, ``dp``, ``fsdp1``, ``fsdp2``, ``deepspeed``."""
    compiled: bool
    sharded: bool
    """Whether parameters are spread over ranks, so that every forward is collective."""

    def as_table(self) -> dict[str, Any]:
        """The map that travels in ``Hello.topology``."""
        return {
            "data_parallel_rank": self.rank,
            "data_parallel_size": self.world_size,
            "local_rank": self.local_rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "wrapper": self.wrapper,
            "compiled": self.compiled,
        }


def wrapper_chain(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what it wraps, and so on to the user's own module; told by type, never by name alone."""
    while True:
        yield model
        if type(model).__name__ not in _WRAPPERS:
            return
        inner = next((i for name in _INNER_NAMES if isinstance(i := getattr(model, name, None), nn.Module)), None)
        if inner is None:
            return
        model = inner


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module beneath ``torch.compile``, DDP and the like."""
    *_, innermost = wrapper_chain(model)
    return innermost


def read_topology(model: nn.Module) -> Topology:
    """What the process group, the environment and the model's wrappers say; reads no device tensor."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if initialized else _number("RANK", 0)
    world_size = torch.distributed.get_world_size() if initialized else _number("WORLD_SIZE", 1)
    names = [_WRAPPERS[type(m).__name__] for m in wrapper_chain(model) if type(m).__name__ in _WRAPPERS]
    wrapper = next((name for name in names if name != "compile"), "none")
    if wrapper == "none" and any(type(p).__name__ == "DTensor" for p in model.parameters()):
        wrapper = "fsdp2"
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", 0),
        wrapper=wrapper,
        compiled="compile" in names or getattr(unwrapped(model), "_compiled_call_impl", None) is not None,
        sharded=wrapper in {"fsdp1", "fsdp2"} or _is_zero_3(model),
    )


def _is_zero_3(model: nn.Module) -> bool:
    return any(hasattr(p, "ds_id") for p in model.parameters())


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def read_environment(model: nn.Module) -> Mapping[str, Any]:
    """Command line, commit, versions, device names and start time, for ``Hello.environment``."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    on_cuda = device.type == "cuda"
    return {
        "command": _masked_command(sys.orig_argv),
        "program": sys.argv[0] if sys.argv else "",
        "working_directory": str(Path.cwd()),
        "git_commit": git_commit(Path.cwd()),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": str(torch.version.cuda or ""),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "cpu_count": os.cpu_count() or 0,
        "started_at": time.time(),
    }


def _masked_command(arguments: list[str]) -> list[str]:
    """The command line without values that look like secrets."""
    masked: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = is_secret(name)
        masked.append("***" if hide_next else f"{name}=***" if secret and equals else argument)
        hide_next = secret and not equals and argument.startswith("-")
    return masked


def is_secret(name: str) -> bool:
    """Whether a setting's name says that its value is nobody's business."""
    lowered = name.lower().replace("-", "_")
    words = ("api_key", "apikey", "password", "passwd", "secret", "access_token", "auth_token", "hf_token", "private_key")
    return any(word in lowered for word in words)


def git_commit(folder: Path) -> str:
    """The commit checked out in the repository around a folder, or empty; read from its files, no process started."""
    for parent in (folder, *folder.parents):
        place = parent / ".git"
        if place.exists():
            try:
                return _read_head(place)
            except (OSError, ValueError):
                return ""  # an unreadable repository is no reason to trouble a training: the run shows no commit
    return ""


def _read_head(place: Path) -> str:
    if place.is_file():  # a worktree or submodule: "gitdir: PATH"
        place = (place.parent / place.read_text(encoding="utf-8").partition("gitdir:")[2].strip()).resolve()
    head = (place / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref:"):
        return head
    reference = head.removeprefix("ref:").strip()
    shared = place / "commondir"
    common = (place / shared.read_text(encoding="utf-8").strip()).resolve() if shared.exists() else place
    for root in (place, common):
        if (root / reference).exists():
            return (root / reference).read_text(encoding="utf-8").strip()
    packed = common / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.exists() else []
    return next((line.split(" ")[0] for line in lines if line.endswith(" " + reference)), "")
