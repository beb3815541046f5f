"""The report on Sidestep itself: what was lost is drawn where something was, and nothing of ours is the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.report_runs import make_journal, row

from sidestep.worker.outbox import entry
from sidestep.worker.sinks.report import write_report


def page_of(tmp_path: Path, values: dict[str, Any]) -> str:
    start = [entry("run", {"run_id": "run-1"}), row(0, values), row(1, values)]
    return write_report(make_journal(tmp_path / "journal", start), None, tmp_path / "report.html").read_text("utf-8")


WELL = {"sidecar/produced": 9, "sidecar/journal_rows": 8, "sidecar/resent": 0, "sidecar/refused": 0}


def test_messages_are_one_chart_and_zeros_are_none(tmp_path: Path) -> None:
    page = page_of(tmp_path, WELL)
    assert "made by the trainer" in page
    assert "Messages lost or sent again" not in page


def test_losses_are_drawn_together(tmp_path: Path) -> None:
    page = page_of(tmp_path, {**WELL, "sidecar/dropped/losses": 2, "sidecar/resent": 3})
    assert "Messages lost or sent again" in page
    assert "dropped\\u002flosses" in page, "named in the legend"


def test_our_own_names_are_not_among_the_trainers(tmp_path: Path) -> None:
    page = page_of(tmp_path, {**WELL, "loss/trainer_nonfinite": 1, "gradients/global/params_incomplete": 2, "epoch": 0})
    assert "The Trainer&#x27;s Own" not in page
    assert "The Trainer's Own" not in page
    assert "Micro-batches whose own loss is not finite" in page
    assert "Parameters without all their shares" in page
