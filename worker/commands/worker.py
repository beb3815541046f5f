"""``sidestep worker``: serve trainers until SIGTERM, or until there is nothing left to stay for."""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import time
from collections.abc import Callable
from typing import Final

from sidestep.protocol.endpoints import Endpoint, default_endpoint
from sidestep.worker.config import WorkerConfig, load_config
from sidestep.worker.errors import EndpointBusyError
from sidestep.worker.garbage import collect_seldom
from sidestep.worker.intake.listening import owners_at
from sidestep.worker.service import WorkerService
from sidestep.worker.trainers import is_alive

_TAKE_OVER_SECONDS: Final = 60.0
"""An ending worker has 45 s for what is left."""
_TRY_AGAIN_SECONDS: Final = 0.2
_OPEN_FILES: Final = 65_536
"""As many as an incarnation may have ranks (``MAX_RANKS``)."""


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Serve; return 0, or 1 where something was left undelivered."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    config = load_config(vars(options), file=options.config)
    allow_many_ranks()
    service = _the_only(config, say)
    if service is None:
        return 0
    service.take_signals()
    collect_seldom()

    def ready(address: str) -> None:
        say(f"sidestep: listening at {address}, journal {service.journal.folder}")
        say(f"sidestep: a trainer finds it with SIDESTEP_ENDPOINT={address}")

    return service.run(ready)


def allow_many_ranks() -> None:
    """Let this process open as many files as the system grants it: each rank's connection is one, and 1,024 is usual.

    Beyond the limit ZeroMQ takes no further rank, and tries for ever.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _the_only(config: WorkerConfig, say: Callable[[str], None]) -> WorkerService | None:
    """Return the worker of the endpoint, or None where another one serves it and stays for our owner, too.

    Raises:
        EndpointBusyError: another one serves it, and there is no owner to hand over.
    """
    until = time.monotonic() + _TAKE_OVER_SECONDS
    while True:
        try:
            return WorkerService(config, console=sys.stdout)
        except EndpointBusyError:
            if not config.owner_pid or time.monotonic() > until:
                raise
            endpoint = Endpoint.parse(config.endpoint) if config.endpoint else default_endpoint()
            if owners_at(endpoint).join(config.owner_pid):
                say(
                    f"sidestep: a worker at {endpoint.address} serves already, and stays for process {config.owner_pid}"
                )
                return None
            if not is_alive(config.owner_pid):
                return None
            time.sleep(_TRY_AGAIN_SECONDS)  # it is ending: the endpoint is free in a moment
