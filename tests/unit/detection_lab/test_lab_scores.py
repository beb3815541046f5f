"""Figures: bounds, delays, admission, baselines and real logs, on runs that are written down here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.detection.baselines import kill_loss_spike, olmo_rule
from benchmarks.detection.campaign import Outcome
from benchmarks.detection.catalogue import find_case
from benchmarks.detection.facts import Facts, Job
from benchmarks.detection.harm import admit
from benchmarks.detection.judge import Judged, JudgedIncident
from benchmarks.detection.real_logs import judge_real_logs
from benchmarks.detection.repetition import judge_repetition
from benchmarks.detection.report import as_json, as_text, whole_report
from benchmarks.detection.score import Scored, poisson_upper_95, score


def facts(case: str, *, onset: int = 500, loss: float = 0.1, gap: float = 1.0) -> Facts:
    return Facts(
        case=case, suite="digits", seed=1, num_steps=900, onset=onset, digest="", held_out_loss=loss,
        held_out_accuracy=0.9, image_gap=gap, final_loss=loss, seconds=30.0, cpu_seconds=30.0, hook_seconds=0.5,
        wait_seconds=2.0, signal_seconds=0.4, rows_share=1.0,
    )  # fmt: skip


def incident(number: int, step: int, *, level: str = "critical", cause: str = "data_collapsed") -> JudgedIncident:
    return JudgedIncident(
        number=number, name="mass_excess", level=level, opened_step=step, first_step=step, told=[(step, level)],
        causes=[(step, cause)], detectors={"mass_excess": step},
    )  # fmt: skip


def scored(case_name: str, *incidents: JudgedIncident, loss: float = 0.5, onset: int = 500) -> Scored:
    case, _ = find_case(case_name)
    job = Job(case=case_name, suite="digits", seed=1, num_steps=900)
    run = facts(case_name, onset=onset, loss=loss)
    outcome = Outcome(
        job=job,
        facts=run,
        judged=Judged(incidents=list(incidents), num_steps=900, worker_seconds=0.9),
        baselines={"olmo_6sd_loss": [100, 150, 502, 503], "user_literal": [100, 800]},
        num_checks=9,
    )
    admission = admit(case, run, facts("mix")) if case.is_failure else None
    return Scored(outcome=outcome, case=case, split="tuned", admission=admission)


@pytest.mark.parametrize(("count", "bound"), [(0, 2.9957), (1, 4.7439), (5, 10.5130), (30, 40.6906)])
def test_the_poisson_bound_is_the_tables(count: int, bound: float) -> None:
    assert poisson_upper_95(count) == pytest.approx(bound, abs=1e-3)


def test_delays_count_from_the_onset_and_misses_count() -> None:
    found = score(
        [
            scored("labels_become_a", incident(1, 503)),
            scored("half_labels_become_a", incident(1, 560), incident(2, 700)),
            scored("random_labels"),
            scored("cut_answers", incident(1, 520, level="info")),
        ]
    )
    assert (found["failures"], found["found"]) == (4, 2)
    assert (found["recall_within_10"], found["recall_within_50"], found["recall_within_200"]) == (0.25, 0.25, 0.5)
    assert found["median_delay_steps"] == 31.5
    assert found["incidents_per_found_failure"] == 1.5
    assert found["correct_cause_share"] == 1.0
    assert found["detectors"]["mass_excess"]["found"] == 3  # the detector spoke, though nobody was warned


def test_what_is_said_before_the_onset_is_false_and_hides_nothing() -> None:
    found = score([scored("labels_become_a", incident(1, 100), incident(2, 501)), scored("mix", incident(1, 5))])
    assert (found["false_incidents"], found["healthy_steps"]) == (1, 900)  # a failure's early steps are its twin's
    assert found["false_incidents_per_10k"] == pytest.approx(1e4 / 900, abs=1e-3)
    assert found["incidents_before_onset"] == 1
    assert found["recall_within_10"] == 1.0
    assert found["baselines"]["olmo_6sd_loss"]["false_incidents"] == 2  # at 100 and at 502
    assert found["baselines"]["user_literal"]["healthy_checks_flagged"] == pytest.approx(2 / 9, abs=1e-3)


def test_unannounced_switches_and_skewed_runs_are_told_apart() -> None:
    found = score([scored("unannounced_switch", incident(1, 510)), scored("mostly_a")])
    assert (found["false_incidents"], found["healthy_steps"]) == (0, 900)
    assert found["unannounced_switches"] == {"runs": 1, "steps": 900, "incidents": 1}
    assert found["skewed_runs"] == {"runs": 1, "steps": 900, "incidents": 0}


def test_a_failure_without_harm_is_listed_and_does_not_count() -> None:
    case, _ = find_case("cut_answers")
    twin = facts("mix")
    assert not admit(case, facts("cut_answers", loss=0.104), twin).is_admitted
    assert admit(case, facts("cut_answers", loss=0.1051), twin).is_admitted
    assert admit(case, facts("cut_answers", loss=math.nan), twin).is_admitted
    assert admit(case, facts("cut_answers", gap=0.4), twin).is_admitted
    assert not admit(case, facts("cut_answers", gap=0.0), replace(twin, image_gap=0.0)).is_admitted
    shared, _ = find_case("ranks_share_samples")
    assert admit(shared, facts("ranks_share_samples"), twin).is_admitted
    report = whole_report([scored("cut_answers", loss=0.1), scored("labels_become_a", incident(1, 501))], {})
    assert report["failures"] == 1
    assert [row["case"] for row in report["not_admitted"]] == ["cut_answers"]


def test_a_report_is_json_without_numbers_that_are_none_and_a_table() -> None:
    report = whole_report([scored("labels_become_a", incident(1, 501), loss=math.nan), scored("mix")], {"form": "x"})
    assert "NaN" not in as_json(report)
    assert '"recall_within_10": 1.0' in as_json(report)
    assert "| labels_become_a | digits | 1 | 500 |" in as_text(report)


def test_published_rules_speak_where_they_say_they_do() -> None:
    rng = np.random.default_rng(0)
    steady = (2.0 + 0.05 * rng.normal(size=600)).tolist()
    assert not kill_loss_spike(steady)
    jump = [*steady[:300], *[each + 1.0 for each in steady[300:]]]
    assert 300 in olmo_rule(jump)
    assert not [step for step in olmo_rule(jump) if step < 300]
    doubled = [*steady[:300], *[2.5 * each for each in steady[300:]]]
    assert kill_loss_spike(doubled)[0] == 304  # patience of five
    assert olmo_rule([*steady[:200], math.nan]) == [200]


def test_real_logs_are_judged_by_the_loss_alone_or_said_to_be_absent(tmp_path: Path) -> None:
    assert "not there" in judge_real_logs(tmp_path / "none.npz")["skipped"]
    rng = np.random.default_rng(0)
    steady = (3.0 + 2.0 * np.exp(-np.arange(500) / 60) + 0.05 * rng.normal(size=500)).astype(np.float32)
    broken = steady.copy()
    broken[300:] += 1.0
    np.savez(tmp_path / "logs.npz", steady=steady)
    np.savez(tmp_path / "broken.npz", broken=broken)
    calm = judge_real_logs(tmp_path / "logs.npz")
    assert (calm["runs"], calm["steps"], calm["incidents"]) == (1, 500, 0)
    assert judge_real_logs(tmp_path / "broken.npz")["incidents"] >= 1


def test_text_that_repeats_by_itself_is_no_loop_and_every_loop_is_one() -> None:
    found = judge_repetition()
    assert {"english", "tables", "json"} <= set(found["kinds"])
    assert all(kind["checks"] >= 2 for kind in found["kinds"].values())
    assert sum(kind["false_checks"] for kind in found["kinds"].values()) == 0
    assert found["loops_found"] == found["loops"] >= 3 * 64
