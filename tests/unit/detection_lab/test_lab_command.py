"""The command: what it refuses, and when the smoke fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.detection.__main__ import arguments, main, planned, smoke_failures


def report(**changes: Any) -> dict[str, Any]:
    return {
        "recall_within_10": 0.875,
        "false_incidents": 1,
        "not_admitted": [],
        "total": {"hook_failures": 0},
        **changes,
    }


def test_the_smoke_holds_with_one_late_failure_and_one_false_incident() -> None:
    assert smoke_failures(report()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recall_within_10": 0.75}, "recall"),
        ({"recall_within_10": None}, "recall"),
        ({"false_incidents": 2}, "false incidents"),
        ({"not_admitted": [{"case": "cut_answers"}]}, "cut_answers"),
        ({"total": {"hook_failures": 3}}, "hooks failed 3 times"),
    ],
)
def test_the_smoke_says_what_does_not_hold(changes: dict[str, Any], told: str) -> None:
    wrong = smoke_failures(report(**changes))
    assert len(wrong) == 1
    assert told in wrong[0]


def test_a_case_or_a_threshold_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--only", "no_such_case"], ["--set", "detectors.nothing.threshold=1"], ["--set", "cal_up=1"]):
        with pytest.raises(SystemExit) as ended:
            main(given)
        assert ended.value.code == 2
        assert given[1].partition("=")[0].removeprefix("detectors.").split(".")[0] in capsys.readouterr().err


def test_what_is_named_comes_with_its_twin_and_its_thresholds() -> None:
    options = arguments().parse_args(
        [
            "--only",
            "ranks_share_samples",
            "--suites",
            "scenes",
            "--seeds",
            "2",
            "--set",
            "detectors.cal_up.threshold=12",
        ]
    )
    jobs = [each.job for each in planned(options)]
    assert [(job.case, job.suite, job.seed) for job in jobs] == [
        ("ranks_share_samples", "scenes", 1),
        ("ranks_share_samples", "scenes", 2),
        ("ranks_2", "scenes", 1),
        ("ranks_2", "scenes", 2),
    ]
    assert dict(options.changes_given) == {"cal_up.threshold": "12"}


def test_training_without_judging_says_what_harm_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--only", "no_labels", "--suites", "digits", "--seeds", "1", "--steps", "8", "--processes", "1"]
    assert main([*given, "--no-judging", "--traces", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "broken: every batch has something to learn" in shown
    assert "digits mix seed 1: onset 0" in shown
