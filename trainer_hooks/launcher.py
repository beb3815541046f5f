"""Starts a worker where nobody named one: in a session of its own, never waited for."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from sidestep.protocol.endpoints import Endpoint, default_endpoint
from sidestep.protocol.errors import EndpointError
from sidestep.protocol.keys import ClientKeys, client_keys
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.errors import LaunchError
from sidestep.trainer_hooks.placement import choose_endpoint

_DEFAULT_WANDB_HOST = "api.wandb.ai"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """Where the worker of this trainer is."""

    endpoint: str
    """What the publisher connects to."""
    pid: int | None = None
    """The worker's process, where this one started it."""
    journal: Path | None = None
    """Its journal, where this process chose it; another worker may already serve the endpoint and keep its own."""
    keys: ClientKeys | None = None
    """What the worker knows this trainer by, where other hosts can reach it."""


def wandb_mode(environment: Mapping[str, str], home: Path | None = None, *, console: Console | None = None) -> str:
    """Return ``WANDB_MODE``, else ``online`` where a key is at hand, else ``offline``; nobody is asked to log in.

    A netrc that is there and cannot be read is said on ``console``, and holds no key.
    """
    chosen = environment.get("WANDB_MODE", "").strip()
    if chosen:
        return chosen
    has_key = bool(environment.get("WANDB_API_KEY", "").strip()) or _netrc_has_key(
        environment, home or Path.home(), console or Console()
    )
    return "online" if has_key else "offline"


def _netrc_has_key(environment: Mapping[str, str], home: Path, console: Console) -> bool:
    chosen = environment.get("NETRC")
    places = [Path(chosen).expanduser()] if chosen else [home / ".netrc", home / "_netrc"]
    base_url = environment.get("WANDB_BASE_URL", "")
    host = urlsplit(base_url).hostname or _DEFAULT_WANDB_HOST
    for place in places:
        try:
            words = place.read_text("utf-8").split()
        except FileNotFoundError:
            continue  # most people have one of the two, or none
        except (OSError, UnicodeDecodeError) as error:
            console.once(f"netrc-{place}", f"{place} cannot be read ({error}): no W&B key is taken from it.")
            continue
        if any(word == "machine" and name == host for word, name in pairwise(words)):
            return True
    return False


def state_home(environment: Mapping[str, str]) -> Path:
    """Return ``SIDESTEP_HOME``, else ``sidestep`` in ``XDG_STATE_HOME``, else in ``~/.local/state``."""
    if chosen := environment.get("SIDESTEP_HOME"):
        return Path(chosen)
    state = environment.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "sidestep"


def named_endpoint(endpoint: str | None, environment: Mapping[str, str]) -> Endpoint | None:
    """Return the endpoint that the caller or ``SIDESTEP_ENDPOINT`` names, None where neither does.

    Raises:
        EndpointError: it is malformed, or names any free port.
    """
    named = endpoint or environment.get("SIDESTEP_ENDPOINT")
    if not named:
        return None
    parsed = Endpoint.parse(named)
    if parsed.transport == "tcp" and not parsed.port:
        raise EndpointError(f"the endpoint {named!r} names any free port: a trainer needs the worker's own")
    return parsed


def ensure_worker(
    endpoint: str | None = None,
    *,
    rank: int = 0,
    environment: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Launched:
    """Return where to connect: ``endpoint``, else ``SIDESTEP_ENDPOINT``, else a worker that rank 0 starts.

    The worker's own lock keeps it single: a second one at the same endpoint hands its owner over and ends, and the
    first serves both trainers. One line says where it is. It ends by itself once its owners are gone and all is done.

    Raises:
        EndpointError: the endpoint is malformed, or can be reached from other hosts and its keys cannot be used.
        LaunchError: the worker's process could not be started.
    """
    environment = os.environ if environment is None else environment
    named = named_endpoint(endpoint, environment)
    if named is not None:
        # Ranks other than 0 may have to be told the server's key; they ask once they have been.
        keys = client_keys(named, environment) if rank == 0 else None
        return Launched(endpoint=named.address, keys=keys)
    if rank != 0:
        return Launched(endpoint=default_endpoint(environment).address)
    console = console or Console()
    chosen = choose_endpoint(environment, console)
    keys = client_keys(chosen, environment)
    address = chosen.address
    folder = state_home(environment) / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    mode = wandb_mode(environment, console=console)
    pid = _start(address, folder, environment, mode)
    console.line(f"sidestep: started a worker (process {pid}, W&B {mode}); its journal and log are in {folder}")
    return Launched(endpoint=address, pid=pid, journal=folder / "journal", keys=keys)


def _start(address: str, folder: Path, environment: Mapping[str, str], mode: str) -> int:
    command = [
        sys.executable, "-m", "sidestep.worker.cli", "worker",
        "--endpoint", address, "--owner-pid", str(os.getpid()), "--journal", str(folder / "journal"),
    ]  # fmt: skip
    inherited = {name: value for name, value in environment.items() if name not in _NOT_INHERITED}
    try:
        folder.mkdir(parents=True, mode=0o700)
        with (folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=inherited | {"WANDB_MODE": mode},
                start_new_session=True,  # a signal to the trainer's group is not for the worker
            )
    except OSError as error:
        raise LaunchError(
            f"no worker could be started ({error}); training goes on without one. Start it by hand with "
            f"`sidestep worker --endpoint {address}`, or set SIDESTEP_HOME to a folder that can be written."
        ) from error
    process.returncode = 0  # nobody is ever going to wait for it, and nobody is to be warned of that
    return process.pid


_NOT_INHERITED = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
"""Settings of a training process that mean nothing to a worker, or would make it one of the ranks."""
