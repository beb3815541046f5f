"""Where runs are kept when nobody says otherwise, and which of them is the latest.

``SIDESTEP_HOME``, else ``sidestep`` in ``XDG_STATE_HOME``, else ``~/.local/state/sidestep``.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from sidestep.worker.errors import ConfigError, JournalError

LATEST_FILE = "latest"
"""A text file in the home: the folder of the journal that was opened last."""
INDEX_FILE = "index.sqlite"
WORKER_FILE = "worker.json"


def home_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Return the folder of all runs; it is not made here."""
    environment = os.environ if environment is None else environment
    if chosen := environment.get("SIDESTEP_HOME"):
        return Path(chosen).expanduser().absolute()
    state = environment.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "sidestep"


def new_run_folder(home: Path) -> Path:
    """Return a folder of the home that no other run has, named by the time; it is not made here."""
    return home / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def remember_latest(home: Path, journal: Path) -> None:
    """Make ``journal`` the one that ``replay``, ``report`` and ``status`` default to.

    Raises:
        ConfigError: the home cannot be written.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = home / f".{LATEST_FILE}-{secrets.token_hex(4)}"
        fresh.write_text(f"{journal.absolute()}\n", encoding="utf-8")
        fresh.replace(home / LATEST_FILE)
    except OSError as error:
        raise ConfigError(
            f"the folder {home} cannot be written ({error}); set SIDESTEP_HOME to one that can"
        ) from error


def latest_journal(home: Path) -> Path:
    """Return the folder of the journal that was opened last.

    Raises:
        JournalError: there is none yet.
    """
    try:
        return Path((home / LATEST_FILE).read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        raise JournalError(f"no run is known in {home}; name a journal, or start one with `sidestep demo`") from None
    except OSError as error:
        raise JournalError(f"{home / LATEST_FILE} cannot be read: {error}") from error


def journal_in(folder: Path) -> Path:
    """Return the journal that ``folder`` is or holds.

    Raises:
        JournalError: neither it nor its folder ``journal`` is one.
    """
    for candidate in (folder, folder / "journal"):
        if (candidate / INDEX_FILE).is_file():
            return candidate.absolute()
    raise JournalError(f"{folder} is not a journal: neither it nor {folder / 'journal'} holds {INDEX_FILE}")
