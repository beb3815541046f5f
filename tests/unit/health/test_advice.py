"""Each warning of the status page names what is wrong and what to do; a worker that is well has none."""

from __future__ import annotations

from typing import Any

import pytest

from sidestep.worker.advice import BEHIND_ENTRIES, LAGGING_SECONDS, SILENT_SECONDS, warnings


def report(
    run: dict[str, Any] | None = None, sink: dict[str, Any] | None = None, journal: dict[str, Any] | None = None,
    reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    well = {
        "is_ended": False, "ranks_heard": 2, "world_size": 2, "lag_seconds": 0.0, "seconds_since_heard": 0.1,
        "messages": {"losses": {"produced": 9, "dropped": 0, "refused": 0}},
    }  # fmt: skip
    fed = {"state": "running", "entries_behind": 3, "counts": {"respawns": 0}, "complaint": ""}
    return {
        "reason": reason, "runs": {"r": {**well, **(run or {})}}, "sinks": {"wandb": {"r": {**fed, **(sink or {})}}},
        "journal_state": {"damaged": [], "times_full": 0, **(journal or {})},
    }  # fmt: skip


def test_where_all_is_well_there_is_nothing_to_say() -> None:
    assert warnings(report()) == []


LOST = {"losses": {"produced": 9, "dropped": 2, "refused": 3}}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"reason": "the loop is stuck"}, ["the loop is stuck", "nothing that was acked is lost", "log"]),
        ({"run": {"messages": LOST}}, ["gave up 2 messages (2 losses)", "window_bytes"]),
        ({"run": {"messages": LOST}}, ["3 messages (3 losses) could not be read", "same one on both sides"]),
        ({"run": {"closed_deadline": 4}}, ["4 steps closed without all their parts", "last step per rank"]),
        ({"run": {"unprojected": 1}}, ["could not be worked out", "log"]),
        ({"run": {"seconds_since_heard": SILENT_SECONDS + 1}}, ["nothing was heard", "console"]),
        ({"run": {"ranks_heard": 1}}, ["1 of 2 ranks are heard", "attach()"]),
        ({"run": {"lag_seconds": LAGGING_SECONDS + 1}}, ["waited 11 s", "assembly_deadline_seconds"]),
        ({"sink": {"complaint": "error 401"}}, ["W&B does not take run r", "error 401", "It lacks 3 entries"]),
        ({"sink": {"entries_behind": BEHIND_ENTRIES + 1}}, ["catches up", "nothing is to be done"]),
        ({"sink": {"counts": {"stop_requests": 1}}}, ["pressed Stop"]),
        ({"sink": {"entries_refused": 2}}, ["2 entries cannot be told to W&B"]),
        ({"journal": {"damaged": [{"file": "f", "reason": "torn"}]}}, ["f (torn)", "Look at the disk"]),
        ({"journal": {"times_full": 1}}, ["disk was full", "journal_max_bytes"]),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(given: dict[str, Any], wanted: list[str]) -> None:
    told = warnings(report(**given))
    assert any(all(words in text for words in wanted) for text in told), told


def test_of_a_run_that_has_ended_silence_is_no_warning() -> None:
    assert warnings(report(run={"is_ended": True, "seconds_since_heard": 9_999.0, "ranks_heard": 1})) == []
