"""``sidestep run -- COMMAND``: a training command with a worker beside it, from the first step to the report."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Final

from sidestep.protocol.endpoints import Endpoint, runtime_folder
from sidestep.protocol.keys import KEYS_VARIABLE
from sidestep.worker.commands.companion import Companion
from sidestep.worker.config import WorkerConfig, load_config
from sidestep.worker.delivery import wandb_mode
from sidestep.worker.errors import ConfigError, JournalError
from sidestep.worker.intake.listening import private_folder

EXIT_NOT_FOUND: Final = 127
EXIT_NOT_EXECUTABLE: Final = 126
_POLL_SECONDS: Final = 0.2
_OUT_FOLDER: Final = "sidestep-runs"
_ANY_ADDRESS: Final = frozenset({"*", "0.0.0.0", "::"})  # noqa: S104  (compared, not bound)


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run the command; return its exit code."""
    return run_command(options.trained_command, load_config(vars(options), file=options.config), say)


def run_command(command: Sequence[str], config: WorkerConfig, say: Callable[[str], None]) -> int:
    """Run ``command`` with a worker beside it; return the command's exit code, 128 + n for signal n.

    Raises:
        ConfigError: an option cannot be used; nothing was started.
        WorkerError: the worker cannot be started; nor was the command.
    """
    wandb_mode(config.wandb_mode)
    out = config.out or Path.cwd() / _OUT_FOLDER / time.strftime("%Y%m%d-%H%M%S")
    journal = config.journal or out / "journal"
    config = replace(config, out=out, journal=journal, owner_pid=config.owner_pid or os.getpid())
    sockets = None
    if not config.endpoint:
        sockets = runtime_folder() / f"run-{secrets.token_hex(4)}"
        private_folder(sockets.parent)
        private_folder(sockets)
        config = replace(config, endpoint=f"ipc://{sockets}/s")
    variables = {"SIDESTEP_ENDPOINT": _as_trainers_reach(Endpoint.parse(config.endpoint))}
    if config.keys is not None:
        variables[KEYS_VARIABLE] = str(config.keys)
    run_id = os.environ.get("SIDESTEP_RUN_ID") or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    companion = Companion(config)
    try:
        companion.start()
        exit_code = _train(command, companion, {**variables, "SIDESTEP_RUN_ID": run_id}, say)
        is_drained = companion.finish()
    finally:
        companion.end()
        if sockets is not None:
            shutil.rmtree(sockets, ignore_errors=True)
    for line in _closing_lines(config, out, run_id, is_drained=is_drained):
        say(line)
    return exit_code


def _as_trainers_reach(endpoint: Endpoint) -> str:
    """Return the address for trainers of a worker that may listen at all of this host's addresses.

    Raises:
        ConfigError: it names any free port, which a worker that is started again would choose anew.
    """
    if endpoint.transport != "tcp":
        return endpoint.address
    if not endpoint.port:
        raise ConfigError(f"endpoint: {endpoint.address!r} names any free port; name one")
    host = socket.gethostname() if endpoint.host in _ANY_ADDRESS else endpoint.host
    return f"tcp://{f'[{host}]' if ':' in host else host}:{endpoint.port}"


def _train(
    command: Sequence[str], companion: Companion, variables: Mapping[str, str], say: Callable[[str], None]
) -> int:
    try:
        process = subprocess.Popen(list(command), env={**os.environ, **variables})
    except FileNotFoundError:
        say(f"sidestep: {command[0]}: no such command")
        return EXIT_NOT_FOUND
    except OSError as error:
        say(f"sidestep: {command[0]}: {error.strerror}")
        return EXIT_NOT_EXECUTABLE

    def forward(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGINT or not _has_terminal():
            process.send_signal(number)  # a terminal's Ctrl-C has reached the command already

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        while process.poll() is None:
            try:
                process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                companion.keep_alive(time.monotonic())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _has_terminal() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False  # no terminal: a signal has reached us alone


def _closing_lines(config: WorkerConfig, out: Path, run_id: str, *, is_drained: bool) -> list[str]:
    from sidestep.worker.sinks.report import write_report  # noqa: PLC0415  (a plotting library, for this alone)

    journal = config.journal or out / "journal"
    lines = [f"sidestep: run      {run_id}"]
    try:
        chosen = run_id if _has_run(journal, run_id) else None
        report = write_report(journal, chosen, out / "report.html")
        lines.append(f"sidestep: report   {report}   (open it in a browser)")
    except JournalError as error:
        lines = [f"sidestep: no report: {error}. Did the command call sidestep.attach()?"]
    lines.append(f"sidestep: journal  {journal}")
    if wandb_mode(config.wandb_mode) != "disabled":
        lines.append(f"sidestep: W&B      {out / 'wandb'}   (live in a terminal: wandb leet {out / 'wandb'})")
    if not is_drained:
        lines.append(
            f"sidestep: not all of it has reached W&B; see {out / 'worker.log'}, and `sidestep replay {journal}`"
        )
    return lines


def _has_run(journal: Path, run_id: str) -> bool:
    try:
        connection = sqlite3.connect(f"{(journal / 'index.sqlite').absolute().as_uri()}?mode=ro", uri=True)
    except sqlite3.Error:
        return False
    try:
        return connection.execute("SELECT 1 FROM run WHERE run_id = ?", (run_id,)).fetchone() is not None
    except sqlite3.Error:
        return False
    finally:
        connection.close()
