"""Starts a worker where nobody named one: in a session of its own, never waited for."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
_TIME_CHARACTERS = len("20260101-120000")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")


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
    is_to_start: bool = False
    """Whether this process is to start it, once it knows the run."""


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


def place_worker(
    endpoint: str | None = None,
    *,
    rank: int = 0,
    environment: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Launched:
    """Return where to connect: ``endpoint``, else ``SIDESTEP_ENDPOINT``, else where rank 0 is to start a worker.

    Raises:
        EndpointError: the endpoint is malformed, or can be reached from other hosts and its keys cannot be used.
    """
    environment = os.environ if environment is None else environment
    named = named_endpoint(endpoint, environment)
    if named is not None:
        # Ranks other than 0 may have to be told the server's key; they ask once they have been.
        keys = client_keys(named, environment) if rank == 0 else None
        return Launched(endpoint=named.address, keys=keys)
    if rank != 0:
        return Launched(endpoint=default_endpoint(environment).address)
    chosen = choose_endpoint(environment, console or Console())
    return Launched(endpoint=chosen.address, keys=client_keys(chosen, environment), is_to_start=True)


def start_worker(
    placed: Launched,
    run_id: str = "",
    *,
    environment: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Launched:
    """Start the worker of a place, on the journal that holds the run where there is one; nothing is waited for.

    The worker's own lock keeps it single: a second one at the same endpoint hands its owner over and ends, and the
    first serves both trainers. One line says where it is. It ends by itself once its owners are gone and all is done.

    Raises:
        LaunchError: the worker's process could not be started.
    """
    environment = os.environ if environment is None else environment
    console = console or Console()
    folder = run_folder(state_home(environment) / "runs", run_id)
    mode = wandb_mode(environment, console=console)
    pid = _start(placed.endpoint, folder, environment, mode)
    console.line(f"sidestep: started a worker (process {pid}, W&B {mode}); its journal and log are in {folder}")
    return replace(placed, pid=pid, journal=folder / "journal", is_to_start=False)


def run_folder(runs: Path, run_id: str) -> Path:
    """Return the folder of a run that was begun before, else a new one: a run that goes on goes on in its journal."""
    name = run_id if _FOLDER_NAME.match(run_id) else secrets.token_hex(3)
    named = [folder for folder in runs.glob(f"*-{name}") if folder.name[_TIME_CHARACTERS:] == f"-{name}"]
    known = [folder for folder in named if name == run_id and (folder / "journal").is_dir()]
    return max(known, default=runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")


def _start(address: str, folder: Path, environment: Mapping[str, str], mode: str) -> int:
    command = [
        sys.executable, "-m", "sidestep.worker.cli", "worker",
        "--endpoint", address, "--owner-pid", str(os.getpid()), "--journal", str(folder / "journal"),
    ]  # fmt: skip
    inherited = {name: value for name, value in environment.items() if name not in _NOT_INHERITED}
    try:
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
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
