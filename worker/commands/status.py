"""``sidestep status``: ask the worker of a journal how it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from sidestep.worker.health import ask_health
from sidestep.worker.home import home_folder, journal_in, latest_journal


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Say how the worker is; return 0 only when it is healthy."""
    journal = journal_in(options.journal or latest_journal(home_folder()))
    answer = ask_health(journal)
    if options.json:
        say(json.dumps(answer, indent=2, sort_keys=True))
    else:
        for line in _lines(answer):
            say(line)
    return 0 if answer.get("healthy") else 1


def _lines(answer: dict[str, Any]) -> list[str]:
    if not answer.get("healthy"):
        return [f"not healthy: {answer.get('reason') or 'no reason given'}"]
    received = answer.get("receiver", {})
    lines = [
        f"healthy: process {answer['pid']} at {answer['endpoint']}",
        f"journal: {answer['journal']}, {received.get('journaled', 0)} messages since the start",
    ]
    sinks = answer.get("sinks", {}).get("wandb", {})
    for run_id, figures in answer.get("runs", {}).items():
        behind = sinks.get(run_id, {}).get("entries_behind", 0)
        lines.append(f"run {run_id}: {figures['open_steps']} open steps, W&B lacks {behind} entries")
    return lines
