"""What a W&B run is opened with, from the outbox's entry ``run``: the trainer's facts in place of the worker's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_settings(opening: Mapping[str, Any], *, init_seconds: float = 20.0, finish_seconds: float) -> dict[str, Any]:
    """Return fields of ``wandb.Settings``; system metrics are the trainer's where its process is visible, else none.

    A finish that has not uploaded everything after ``finish_seconds`` raises: taken for done, it would lose rows.
    """
    environment = opening.get("environment") or {}
    pid = trainer_pid(environment)
    settings: dict[str, Any] = {
        "console": "off",
        "disable_git": True,
        "finish_timeout": finish_seconds,
        "finish_timeout_raises": True,
        "init_timeout": init_seconds,
        "silent": True,
        "stop_on_fatal_error": True,
        "x_disable_machine_info": pid is None,
        "x_disable_meta": True,
        "x_disable_stats": pid is None,
        "x_file_stream_transmit_interval": 5,  # below 1 the SDK falls back to 15
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": 1,  # what a kill may cost offline, in seconds
    }
    if pid is not None:
        settings["x_stats_pid"] = pid
    if environment.get("host"):
        settings["host"] = str(environment["host"])
    return settings


def shown_config(opening: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trainer's configuration, and beside it where and how the run was made."""
    ours = {key: opening[key] for key in ("environment", "settings") if opening.get(key)}
    return {**(opening.get("config") or {}), "_sidestep": ours}


def trainer_pid(environment: Mapping[str, Any]) -> int | None:
    """Return the trainer's process where it is surely visible from here, so that its own GPUs are charted.

    One host name does not mean one pid namespace (two containers of a pod), so the command line is compared.
    """
    pid, command = environment.get("pid"), environment.get("command")
    if environment.get("host") != socket.gethostname() or not isinstance(pid, int) or not isinstance(command, list):
        return None
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return None
    masked = "***"  # what looks like a secret does not leave the trainer
    same = len(arguments) == len(command) and all(
        masked in str(said) or os.fsencode(str(said)) == real for said, real in zip(command, arguments, strict=True)
    )
    return pid if same else None
