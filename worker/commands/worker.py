"""``sidestep worker``: serve trainers until SIGTERM, or until there is nothing left to stay for."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from sidestep.worker.config import load_config
from sidestep.worker.garbage import collect_seldom
from sidestep.worker.service import WorkerService


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Serve; return 0, or 1 where something was left undelivered."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    config = load_config(vars(options), file=options.config)
    service = WorkerService(config, console=sys.stdout)
    service.take_signals()
    collect_seldom()

    def ready(address: str) -> None:
        say(f"sidestep: listening at {address}, journal {service.journal.folder}")
        say(f"sidestep: a trainer finds it with SIDESTEP_ENDPOINT={address}")

    return service.run(ready)
