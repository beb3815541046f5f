"""``sidestep replay``: rebuild the runs of a journal, and bring them to a fresh W&B run and a report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from sidestep.worker.config import WorkerConfig
from sidestep.worker.delivery import Deliveries
from sidestep.worker.errors import ConfigError
from sidestep.worker.home import home_folder, journal_in, latest_journal
from sidestep.worker.recompute import Recomputed, recompute
from sidestep.worker.rejudging import parse_changes
from sidestep.worker.replay import ROWS_FILE, Comparison, replay
from sidestep.worker.sinks.console_sink import ConsoleSink

_DRAIN_SECONDS: Final = 600.0


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Rebuild, compare, deliver; return 1 where a run is not identical, not rebuilt or not delivered.

    Raises:
        ConfigError: a setting cannot be set, or there is nothing that it would be set for.
        JournalError: the journal cannot be read, or lacks messages that a recompute needs.
    """
    changes = parse_changes(options.changes)
    if changes and not options.recompute:
        raise ConfigError("--set: needs --recompute; a plain replay obeys what was decided when the run was recorded")
    journal = journal_in(options.journal or latest_journal(home_folder()))
    kind = "recomputed" if options.recompute else "replay"
    out = (options.out or journal.parent / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    runs: Sequence[Comparison | Recomputed]
    if options.recompute:
        deadline = WorkerConfig().assembly_deadline_seconds
        folder, runs = recompute(journal, out, changes, partial(_tell_recomputed, say), deadline_seconds=deadline)
        is_as_recorded = True
    else:
        folder, compared = replay(journal, out, partial(_tell_replayed, say))
        runs, is_as_recorded = compared, all(made.is_identical for made in compared)
    say(f"rows     {out / ROWS_FILE}")
    behind = _deliver(folder, out, runs)
    say(f"W&B      {out / 'wandb'}" + (f"   ({sum(behind.values())} entries are missing)" if behind else ""))
    for line in _reports(folder, out, runs):
        say(line)
    return 0 if is_as_recorded and not behind else 1


def _tell_replayed(say: Callable[[str], None], made: Comparison) -> None:
    if made.missing:
        say(
            f"run {made.run_id}: NOT REBUILT, its messages are not all here ({made.missing}); its {made.entries} "
            f"recorded entries, {made.rows} rows, are taken as they are"
        )
    elif made.is_identical:
        say(f"run {made.run_id}: {made.entries} entries, {made.rows} rows: identical to what was recorded")
    else:
        say(
            f"run {made.run_id}: DIFFERS from what was recorded, first at position {made.first_difference}"
            f" ({made.entries} entries, {made.recorded} were recorded)"
        )


def _tell_recomputed(say: Callable[[str], None], made: Recomputed) -> None:
    otherwise = f", {made.closed_otherwise} of them closed otherwise than recorded" if made.closed_otherwise else ""
    say(
        f"run {made.of}: recomputed as {made.run_id}: {made.entries} entries, {made.rows} rows, "
        f"{made.steps} steps{otherwise}"
    )


def _deliver(journal: Path, out: Path, runs: Sequence[Comparison | Recomputed]) -> dict[str, int]:
    console = ConsoleSink(sys.stdout)
    deliveries = Deliveries(WorkerConfig(), journal=journal, out=out, console=console, mode="offline")
    for made in runs:
        deliveries.open(made.run_id)
    return deliveries.close([made.run_id for made in runs if made.is_ended], _DRAIN_SECONDS)


def _reports(journal: Path, out: Path, runs: Sequence[Comparison | Recomputed]) -> list[str]:
    from sidestep.worker.sinks.report import write_report  # noqa: PLC0415  (a plotting library, for this alone)

    lines = []
    for made in runs:
        if made.rows:
            name = "report.html" if made is runs[-1] else f"report-{made.run_id}.html"
            lines.append(f"report   {write_report(journal, made.run_id, out / name)}")
    return lines
