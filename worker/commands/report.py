"""``sidestep report``: write a run's report as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from sidestep.worker.home import home_folder, journal_in, latest_journal


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Write the report and say where it lies."""
    from sidestep.worker.sinks.report import write_report  # noqa: PLC0415  (a plotting library, for this alone)

    journal = journal_in(options.journal or latest_journal(home_folder()))
    say(str(write_report(journal, options.run, options.out or journal.parent / "report.html")))
    return 0
