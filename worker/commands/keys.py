"""``sidestep keys DIR``: the key files of a worker that trainers on other hosts reach."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from sidestep.protocol.keys import CLIENT_SECRET, CLIENTS, KEYS_VARIABLE, SERVER_PUBLIC, SERVER_SECRET
from sidestep.worker.keys import make_keys


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Make them; return 0."""
    folder = options.folder.expanduser().absolute()
    make_keys(folder)
    say(f"sidestep: keys are in {folder}, readable by you alone")
    say(f"sidestep: the worker's host needs    {SERVER_SECRET}  {CLIENTS}/")
    say(f"sidestep: each training host needs   {CLIENT_SECRET}  {SERVER_PUBLIC}")
    say(f"sidestep: set {KEYS_VARIABLE}={folder} on both sides (a shared home, or copies with mode 600)")
    return 0
