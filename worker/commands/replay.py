"""``sidestep replay``: rebuild the runs of a journal, and bring them to a fresh W&B run and a report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sidestep.worker.config import WorkerConfig
from sidestep.worker.delivery import Deliveries
from sidestep.worker.home import home_folder, journal_in, latest_journal
from sidestep.worker.replay import ROWS_FILE, Comparison, replay
from sidestep.worker.sinks.console_sink import ConsoleSink

_DRAIN_SECONDS: Final = 600.0


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Rebuild, compare, deliver; return 1 where a run is not identical, not rebuilt or not delivered."""
    journal = journal_in(options.journal or latest_journal(home_folder()))
    out = (options.out or journal.parent / f"replay-{time.strftime('%Y%m%d-%H%M%S')}").absolute()

    def tell(made: Comparison) -> None:
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

    folder, comparisons = replay(journal, out, tell)
    say(f"rows     {out / ROWS_FILE}")
    behind = _deliver(folder, out, comparisons)
    say(f"W&B      {out / 'wandb'}" + (f"   ({sum(behind.values())} entries are missing)" if behind else ""))
    for line in _reports(folder, out, comparisons):
        say(line)
    return 0 if all(made.is_identical for made in comparisons) and not behind else 1


def _deliver(journal: Path, out: Path, runs: list[Comparison]) -> dict[str, int]:
    console = ConsoleSink(sys.stdout)
    deliveries = Deliveries(WorkerConfig(), journal=journal, out=out, console=console, mode="offline")
    for made in runs:
        deliveries.open(made.run_id)
    return deliveries.close([made.run_id for made in runs if made.is_ended], _DRAIN_SECONDS)


def _reports(journal: Path, out: Path, comparisons: list[Comparison]) -> list[str]:
    from sidestep.worker.sinks.report import write_report  # noqa: PLC0415  (a plotting library, for this alone)

    lines = []
    for made in comparisons:
        if made.rows:
            name = "report.html" if made is comparisons[-1] else f"report-{made.run_id}.html"
            lines.append(f"report   {write_report(journal, made.run_id, out / name)}")
    return lines
