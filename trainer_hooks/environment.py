"""What a run says about where it ran: host, command line, commit, versions. Files are read, nothing is started."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sidestep.protocol.messages import Json
from sidestep.trainer_hooks.kernels.choice import stated
from sidestep.trainer_hooks.plain import without_secrets

_MAX_ARGUMENTS = 256
_MAX_ARGUMENT_CHARACTERS = 1_024
_SECRET_NAME = re.compile(r"(?i)(api[-_]?key|token|secret|passw(or)?d|credential)s?\Z")
_SECRET_VALUE = re.compile(r"(?i)^(-{0,2}[\w.-]*(?:api[-_]?key|token|secret|passw(?:or)?d|credential)s?)=.*", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")
_URL_USER = re.compile(r"(\w+://)[^/@\s]+@")


def command_line(arguments: list[str]) -> list[str]:
    """Return ``arguments`` without the values of options that are named like secrets, nor users inside URLs."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments[:_MAX_ARGUMENTS]:
        hidden = "***" if hide_next and not argument.startswith("-") else without_secrets(argument)
        hidden = _URL_USER.sub(r"\1***@", _SECRET_VALUE.sub(r"\1=***", hidden))
        shown.append(hidden[:_MAX_ARGUMENT_CHARACTERS])
        hide_next = argument.startswith("-") and _SECRET_NAME.search(argument) is not None
    return shown


def git_commit(folder: Path) -> dict[str, str]:
    """Return ``git_commit`` and, on a branch, ``git_branch`` of the checkout that holds ``folder``; empty without one.

    Reads .git itself: starting git could take seconds on a network file system.
    """
    for parent in (folder, *folder.parents):
        marker = parent / ".git"
        try:
            if marker.is_dir():
                return _read_head(marker)
            if marker.is_file():  # a worktree or a submodule
                pointer = marker.read_text("utf-8").removeprefix("gitdir:").strip()
                return _read_head((parent / pointer).resolve())
        except (OSError, UnicodeDecodeError):
            return {}  # unreadable is the same as absent: the page then shows no commit
    return {}


def _read_head(git: Path) -> dict[str, str]:
    head = (git / "HEAD").read_text("utf-8").strip()
    if not head.startswith("ref:"):
        return {"git_commit": head} if _COMMIT.match(head) else {}
    name = head.removeprefix("ref:").strip()
    shared = git
    if (git / "commondir").is_file():
        shared = (git / (git / "commondir").read_text("utf-8").strip()).resolve()
    commit = _read_reference(shared, name)
    found = {"git_branch": name.removeprefix("refs/heads/")}
    return found | {"git_commit": commit} if _COMMIT.match(commit) else found


def _read_reference(git: Path, name: str) -> str:
    loose = git / name
    if loose.is_file():
        return loose.read_text("utf-8").strip()
    packed = git / "packed-refs"
    if packed.is_file():
        for line in packed.read_text("utf-8").splitlines():
            commit, _, reference = line.partition(" ")
            if reference == name:
                return commit
    return ""


def snapshot(device: torch.device | None = None) -> dict[str, Json]:
    """Return what ``Hello.environment`` carries; no environment variable is in it, and no secret.

    Args:
        device: Where the model is; its name is added, and whether reductions run there as kernels.

    Raises:
        ValueError: ``SIDESTEP_KERNELS`` has a value that there is not.
    """
    from sidestep import __version__  # noqa: PLC0415  (the package's own module loads nothing, and is loaded last)

    known: dict[str, Json] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command_line": command_line([sys.executable, *sys.argv]),
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "sidestep": __version__,
        "platform": platform.platform(),
        "num_cpus": os.cpu_count() or 0,
        "started_at": time.time(),
        "device": _device_name(device),
        "kernels": stated(torch.device("cpu") if device is None else device),
    }
    return known | git_commit(_code_folder())


def _code_folder() -> Path:
    """Return the folder of the script that runs, which need not be the working folder."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(script).resolve().parent if script else Path.cwd()


def _device_name(device: torch.device | None) -> str:
    if device is None or device.type == "cpu":
        return platform.machine() + " CPU"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device)
