from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.detector_traces import (
    Drawn,
    Task,
    changed,
    context,
    counted,
    trace,
    watched,
)

from sidestep.protocol.metric_names import COLLAPSE_LINE
from sidestep.worker.detectors.base import Finding
from sidestep.worker.detectors.catalogue import KINDS, Severity, kind_of
from sidestep.worker.detectors.facts import FACTS
from sidestep.worker.detectors.persistence import Firing
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.incident_causes import CAUSES, UNKNOWN, likely_cause
from sidestep.worker.incident_text import heading
from sidestep.worker.incidents import IncidentLog
from sidestep.worker.metrics.measurement import Value
from sidestep.worker.step_record import StepRecord
from sidestep.worker.text.incident_table import COLUMNS
from sidestep.worker.watch import Policy, Watch

TASK = Task(batch=8)
NAN = np.array([np.nan], np.float32)


def at(*steps: int, **changes: Any) -> Any:
    def fail(drawn: Drawn) -> None:
        if drawn.step in steps:
            changed(**changes)(drawn)

    return fail


def firing(name: str, step: int, first: int | None = None) -> Any:
    reading = Reading(name=name, value=2.0, limit=1.0, is_beyond=True, evidence=f"{name} says so")
    return Firing(reading=reading, step=step, first_step=step if first is None else first), kind_of(name)


class Log:
    """Incidents fed by names; all that ever spoke stays active until told otherwise."""

    def __init__(self) -> None:
        self.log = IncidentLog()
        self.active: set[str] = set()

    def take(self, step: int, *names: str, facts: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
        self.active |= set(names)
        changes = self.log.take(
            StepRecord(step=step, batch_digest=step + 1),
            [firing(name, step) for name in names],
            facts=facts,
            suspicious=frozenset(),
            active=self.active,
        )
        saved = self.log.state()
        self.log = IncidentLog()
        self.log.restore(saved)
        assert self.log.state() == saved
        return [(change.kind, change.incident.name) for change in changes]


def test_what_speaks_within_a_hundred_steps_is_one_incident() -> None:
    log = Log()
    assert log.take(10, "cal_up") == [("opened", "cal_up")]
    assert log.take(60, "loss_cusum") == [("evidence", "cal_up")]
    assert log.take(160, "no_stop_token") == [("evidence", "cal_up")], "within 100 steps of the newest evidence"
    assert log.take(360, "nonfinite") == [("evidence", "cal_up")], "a failure that goes on"
    assert log.take(561, "lr_zero") == [("opened", "lr_zero")]
    assert [each.number for each in log.log.open] == [1, 2]
    assert log.log.open[0].detectors == ["cal_up", "loss_cusum", "no_stop_token", "nonfinite"]


def test_a_failure_that_goes_on_is_followed_for_longer() -> None:
    log = Log()
    log.take(10, "cal_up")
    assert log.take(300, "loss_regress") == [("evidence", "cal_up")]
    assert log.take(501, "lr_zero") == [("opened", "lr_zero")], "an exact check is a story of its own"
    warned = Log()
    warned.take(2, "image_embed_zero")
    assert warned.take(700, "gen_length") == [("evidence", "image_embed_zero")], "a warning beside an open failure"
    assert Log().take(700, "gen_length") == [("opened", "gen_length")]
    other = Log()
    other.take(2, "image_embed_zero")
    assert other.take(700, "cal_up") == [("opened", "cal_up")]


def test_an_incident_gets_worse_and_is_renamed_once() -> None:
    log = Log()
    assert log.take(5, "target_shift") == [("opened", "target_shift")]
    assert log.take(20, "cal_up") == [("worse", "cal_up")]
    assert log.take(30, "mass_excess") == [("worse", "mass_excess")], "of the collapse class now"
    assert log.take(40, "single_answer") == [("evidence", "mass_excess")]
    (incident,) = log.log.open
    assert (incident.severity, incident.is_collapse, incident.first_step) == (Severity.CRITICAL, True, 5)


def test_the_most_severe_of_several_names_it() -> None:
    assert Log().take(5, "no_update", "grad_spike", "mass_excess") == [("opened", "mass_excess")]
    assert Log().take(5, "no_labels", "nonfinite") == [("opened", "no_labels")], "the first of the catalogue"


def test_it_closes_when_nothing_of_it_is_active() -> None:
    log = Log()
    log.take(5, "cal_up")
    assert log.take(6) == []
    log.active.clear()
    assert log.take(7) == [("closed", "cal_up")]
    assert log.log.open == []


def test_an_incident_that_nothing_judges_any_more_is_closed() -> None:
    log = Log()
    log.take(5, "init_loss")
    assert log.take(1_004) == []
    assert log.take(1_006) == [("closed", "init_loss")]


def test_only_what_speaks_early_tells_the_cause() -> None:
    log = Log()
    log.take(5, "cal_up", facts=frozenset({"abrupt", "outputs_unchanged"}))
    assert log.log.open[0].cause == "labels_or_inputs_wrong"
    assert log.take(20, "target_single") == [("cause", "cal_up")]
    assert log.log.open[0].cause == "data_collapsed"
    late = Log()
    late.take(5, "cal_up", facts=frozenset({"abrupt", "outputs_unchanged"}))
    assert late.take(50, "module_dead") == [("evidence", "cal_up")], "a consequence"


def test_of_exact_checks_the_first_steps_tell_the_cause() -> None:
    log = Log()
    log.take(5, "label_alignment")
    log.take(8, "cal_up")
    assert log.take(17, "image_tokens_labelled") == [("evidence", "label_alignment")]
    assert log.log.open[0].cause == "label_shift"
    both = Log()
    both.take(5, "label_alignment")
    both.take(9, "image_tokens_labelled")
    assert both.log.open[0].cause == "image_tokens_labelled", "within eight steps the order of trust decides"
    after = Log()
    after.take(5, "loss_spike")
    after.take(25, "no_stop_token")
    assert after.log.open[0].cause == "stop_token_missing", "a statistic gives way to it"


def test_a_fall_after_a_rise_is_a_recovery_and_no_leak() -> None:
    log = Log()
    log.take(5, "cal_up", facts=frozenset({"abrupt", "outputs_unchanged"}))
    assert log.take(20, "cal_down") == [("evidence", "cal_up")]
    assert log.log.open[0].cause == "labels_or_inputs_wrong"
    fallen = Log()
    fallen.take(5, "cal_down")
    fallen.take(9, "confidence_gap")
    assert fallen.log.open[0].cause == "leak"


@pytest.mark.parametrize(
    ("detectors", "facts", "cause"),
    [
        ("no_labels", "", "batch_without_labels"),
        ("no_labels nonfinite", "rate_raised", "batch_without_labels"),
        ("label_masked_pos cal_up", "", "padding_labelled"),
        ("pad_labelled", "", "padding_labelled"),
        ("label_leak cal_down", "", "label_leak"),
        ("no_stop_token gen_length", "", "stop_token_missing"),
        ("dup_batch cal_up", "", "loader_stuck"),
        ("dup_ranks dup_in_batch", "", "ranks_share_data"),
        ("image_constant image_embed_constant cal_up", "", "images_alike"),
        ("image_constant data_repeats", "", "images_alike"),
        ("image_constant dup_in_batch", "", "data_repeats"),
        ("data_repeats", "", "data_repeats"),
        ("nonfinite no_update updates_skipped", "", "numbers_lost"),
        ("init_loss nonfinite", "", "bad_start"),
        ("cal_up mass_excess", "targets_changed outputs_changed", "labels_or_inputs_wrong"),
        ("rank_desync rank_outlier", "", "replicas_apart"),
        ("lr_zero no_update", "", "rate_is_zero"),
        ("image_embed_zero module_dead", "", "projector_silent"),
        ("module_dead cal_up", "", "module_detached"),
        ("nonfinite grad_spike", "rate_raised gradient_up", "diverged"),
        ("nonfinite", "gradient_up", "diverged"),
        ("nonfinite", "", "numbers_lost"),
        ("target_single single_answer cal_up", "", "data_collapsed"),
        ("rank_outlier", "", "rank_broken"),
        ("cal_up mass_excess", "rate_raised outputs_changed", "rate_too_high"),
        ("cal_up mass_excess", "abrupt outputs_changed", "weights_damaged"),
        ("cal_up mass_excess", "abrupt outputs_changed weights_steady", "forward_changed"),
        ("cal_up mass_excess", "abrupt inputs_changed outputs_changed weights_steady", "inputs_changed"),
        ("cal_up mass_excess", "abrupt outputs_unchanged updates_changed", "optimisation"),
        ("cal_up mass_excess", "gradual outputs_unchanged", "optimisation"),
        ("cal_up", "gradual intermittent outputs_unchanged weights_steady", "labels_or_inputs_wrong"),
        ("cal_up", "gradual intermittent outputs_unchanged updates_changed", "optimisation"),
        ("cal_up", "gradual intermittent outputs_changed", "optimisation"),
        ("underconfident loss_spike", "abrupt outputs_changed weights_steady", "forward_changed"),
        ("underconfident loss_spike", "gradual outputs_unchanged weights_steady", "too_smooth"),
        ("underconfident", "", "too_smooth"),
        ("cal_up confidence_gap", "abrupt outputs_unchanged", "labels_or_inputs_wrong"),
        ("label_masked_pos cal_up", "all_masked abrupt", "mask_inverted"),
        ("weights_jump cal_up", "abrupt outputs_unchanged", "weights_damaged"),
        ("optimizer_reset weights_jump", "", "optimizer_lost"),
        ("optimizer_settings cal_up", "", "optimizer_misset"),
        ("settings_changed weights_jump", "rate_raised", "optimizer_misset"),
        ("module_spike", "", "module_broken"),
        ("modules_spike module_spike", "gradient_up", "optimisation"),
        ("modules_spike module_spike cal_up", "rate_raised", "rate_too_high"),
        ("modules_spike module_spike cal_up", "abrupt outputs_changed weights_steady", "forward_changed"),
        ("gradients_lost grad_spike", "", "gradients_thrown_away"),
        ("rows_without_labels length_shift", "", "samples_empty"),
        ("no_labels rows_without_labels", "", "batch_without_labels"),
        ("begun_twice target_shift", "", "begun_twice"),
        ("image_scale cal_up", "abrupt", "pixels_scaled"),
        ("loss_differs loss_spike", "", "loss_changed"),
        ("mass_excess single_answer", "", "optimisation"),
        ("user_rules", "", "optimisation"),
        ("cal_down", "", "leak"),
        ("target_shift cal_up", "outputs_unchanged", "data_changed"),
        ("image_unused", "", "images_lost"),
        ("gen_length", "", "generation"),
        ("something_else", "", "unknown"),
    ],
)
def test_the_cause_follows_from_who_spoke(detectors: str, facts: str, cause: str) -> None:
    assert likely_cause(frozenset(detectors.split()), frozenset(facts.split())).name == cause


def test_every_detector_has_a_cause_of_its_own() -> None:
    known = {name for cause in CAUSES for name in cause.any_of}
    assert known <= set(KINDS)
    assert {fact for cause in CAUSES for fact in cause.facts} <= set(FACTS)
    for name in KINDS:
        assert likely_cause(frozenset({name}), frozenset(FACTS)) is not UNKNOWN, name


def test_headings_are_the_user_s_line_for_a_collapse_only() -> None:
    assert heading("mass_excess", Severity.CRITICAL, is_collapse=True) == COLLAPSE_LINE.format(reason="mass_excess")
    others = [heading("nonfinite", severity, is_collapse=False) for severity in Severity]
    assert len(set(others)) == 3
    assert not any("COLLAPSE" in line for line in others)


def test_one_block_one_alert_one_row_with_samples() -> None:
    told = watched(trace(TASK, 6, failure=at(3, 4, trainer_losses=NAN)))
    verdict = told.verdicts[3]
    (announcement,) = verdict.announcements
    assert announcement.line == "🛑 TRAINING FAILURE DETECTED: nonfinite"
    assert (announcement.level, announcement.is_alert) == ("critical", True)
    block = "\n".join(announcement.block)
    for part in ("why: ", "step 3", "evidence: nonfinite: ", "likely cause: ", "what to do next: "):
        assert part in block
    assert len(block.encode()) < 2_000
    log, samples = verdict.tables
    assert (log.key, log.columns, len(log.rows)) == ("incidents/log", COLUMNS, 1)
    row = dict(zip(log.columns, log.rows[0], strict=True))
    told_row = (row["name"], row["severity"], row["first_step"], row["detectors"])
    assert told_row == ("nonfinite", "critical", 3, "nonfinite")
    assert len(row["batches"]) == 16
    assert samples.key == "incidents/samples"
    assert len(samples.rows) == 8
    losses = [each[-1] for each in samples.rows]
    assert losses == sorted(losses, reverse=True)
    assert samples.rows[0][3].startswith("t1")
    assert told.verdicts[4].announcements == ()
    assert verdict.values == {"incidents/nonfinite": 1, "incidents/open": 1}
    assert told.verdicts[4].values == {}
    assert told.verdicts[4].companions == {"incidents/open": 1}


def test_an_incident_is_closed_after_clean_steps_and_not_raised_again_while_it_cools() -> None:
    told = watched(trace(TASK, 300, failure=at(10, 100, 250, trainer_losses=NAN)))
    assert told.openings == [(10, "nonfinite"), (250, "nonfinite")]
    closed = [step for step, verdict in told.verdicts.items() if verdict.values.get("incidents/nonfinite") == 0]
    assert closed[0] == 60
    assert told.verdicts[60].values == {"incidents/nonfinite": 0, "incidents/open": 0}


def test_a_resumed_run_takes_back_what_came_after() -> None:
    watch = Watch()
    watched(trace(TASK, 20, failure=at(15, trainer_losses=NAN)), watch)
    watch.begin(1, 12)
    told = watched(trace(TASK, 8, failure=at(16, trainer_losses=NAN), first=12), watch)
    assert told.verdicts[12].values == {"incidents/nonfinite": 0, "incidents/open": 0}
    assert told.openings == [(16, "nonfinite")], "it is said again: it happened again"


def test_the_same_batches_again_after_a_resume_are_no_stuck_loader() -> None:
    watch = Watch()
    watched(trace(TASK, 20), watch)
    watch.begin(1, 17)
    assert watched(trace(TASK, 10, first=17), watch).openings == []


def test_going_far_back_learns_anew_instead_of_comparing_with_the_future() -> None:
    task = Task(learning_steps=150.0)
    watch = Watch()
    watched(trace(task, 300), watch)
    watch.begin(1, 20)
    told = watched(trace(task, 40, first=20), watch)
    assert told.lines == []
    assert "cal_up" not in told.verdicts[20].readings


def finding() -> tuple[Finding, Mapping[str, Value]]:
    line = COLLAPSE_LINE.format(reason="single_token_dominance+identical_sequences")
    said = Finding(code="collapse", title="Model collapse", line=line, detail="16 samples, most common: 'A' with 100%")
    return said, {"collapse/is_collapsed": 1, "collapse/collapse_reason": "single_token_dominance+identical_sequences"}


def test_the_user_s_rules_open_an_incident_with_their_own_line_once() -> None:
    said, verdict = finding()
    watch = Watch()
    steps = list(trace(TASK, 3))
    first = watch.observe(steps[0], context(), verdict=verdict, findings=[said])
    assert [each.line for each in first.announcements] == [said.line]
    assert first.values["incidents/user_rules"] == 1
    assert "likely cause" in "\n".join(first.announcements[0].block)
    again = watch.observe(steps[1], context(), verdict=verdict)
    assert again.announcements == ()
    healthy: dict[str, Value] = {"collapse/is_collapsed": 0, "collapse/collapse_reason": "none"}
    assert watch.observe(steps[2], context(), verdict=healthy).values["incidents/user_rules"] == 0


def test_the_user_s_rules_keep_their_line_where_an_incident_is_open_already() -> None:
    said, verdict = finding()
    watch = Watch()
    steps = list(trace(TASK, 3, failure=counted(answers_with_eos=0)))
    opened = [watch.observe(step, context()) for step in steps]
    assert opened[2].values["incidents/no_stop_token"] == 1
    step = next(trace(TASK, 1, first=3))
    told = watch.observe(step, context(), verdict=verdict, findings=[said])
    assert [each.line for each in told.announcements].count(said.line) == 1
    assert told.values["incidents/user_rules"] == 1, "it is of the collapse class now"
    assert told.values["incidents/no_stop_token"] == 0


def test_a_disabled_detector_is_silent() -> None:
    settings = replace(DetectorSettings(), nonfinite=replace(DetectorSettings().nonfinite, enabled=False))
    told = watched(trace(TASK, 3, failure=changed(trainer_losses=NAN)), Watch(settings))
    assert told.openings == []


def test_samples_are_asked_for_once_in_a_while_when_something_is_suspicious() -> None:
    def fail(drawn: Drawn) -> None:
        drawn.loss_shift[0] = 0.6

    told = watched(trace(Task(), 200, failure=fail, onset=150))
    asked = [(step, each.action) for step, verdict in told.verdicts.items() for each in verdict.requests]
    assert len(asked) == 1
    assert asked[0][1] == "sample"
    assert 150 <= asked[0][0] <= 152
    quiet = Watch(policy=Policy(sample_when_suspicious=False))
    told = watched(trace(Task(), 160, failure=fail, onset=150), quiet)
    assert not any(verdict.requests for verdict in told.verdicts.values())


@pytest.mark.parametrize("action", ["checkpoint", "stop"])
def test_a_policy_asks_for_more_when_an_incident_is_critical(action: str) -> None:
    watch = Watch(policy=Policy(on_critical=action))
    told = watched(trace(TASK, 6, failure=at(3, 4, trainer_losses=NAN)), watch)
    asked = [(step, each.action, each.reason) for step, verdict in told.verdicts.items() for each in verdict.requests]
    assert asked == [(3, action, "incident nonfinite")]


def test_incidents_that_change_at_one_step_share_a_table() -> None:
    def fail(drawn: Drawn) -> None:
        if 10 <= drawn.step <= 230:
            counted(labels_masked=5)(drawn)
        at(280, trainer_losses=NAN)(drawn)

    told = watched(trace(TASK, 282, failure=fail))
    (table,) = [table for table in told.verdicts[280].tables if table.key == "incidents/log"]
    assert sorted((row[0], row[1]) for row in table.rows) == [(1, "label_masked_pos"), (2, "nonfinite")]
    values = told.verdicts[280].values
    assert (values["incidents/label_masked_pos"], values["incidents/nonfinite"], values["incidents/open"]) == (0, 1, 1)


def test_open_incidents_are_told_at_the_end() -> None:
    watch = Watch()
    watched(trace(TASK, 6, failure=at(3, 4, trainer_losses=NAN)), watch)
    (table,) = watch.open_rows()
    assert table.rows[0][1] == "nonfinite"
    assert Watch().open_rows() == ()
