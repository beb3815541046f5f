"""The report: one HTML file that shows a run without an account, a server or a network (docs/report.md).

``write_report`` reads a run's outbox, which is all that any sink sees, and draws the verdict, the user's six sections,
the samples and the highest-loss tokens. All text of a run is escaped, and the page's own policy forbids every request.
"""

from __future__ import annotations

from sidestep.worker.sinks.report.write import write_report

__all__ = ("write_report",)
