"""A recorded run is judged anew: from its raw messages, as another run, by other settings; the old one stays."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.message_line import RUN, Line
from tests.support.wire_trainer import WireTrainer, make_hello
from tests.support.worker_process import WorkerProcess, wait_until

from sidestep.protocol.messages import Goodbye, Notice
from sidestep.worker.contexts import build_context, survey
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.errors import ConfigError, JournalError
from sidestep.worker.intake.journal import Journal
from sidestep.worker.recompute import Recomputed, new_run_id, recompute
from sidestep.worker.records import StepClosing
from sidestep.worker.rejudging import SETTABLE, parse_changes
from sidestep.worker.settings import RunSettings
from sidestep.worker.watch_making import make_watch


@pytest.fixture(scope="module")
def recorded() -> Iterator[WorkerProcess]:
    """Two ranks, an attempt that is given up, and one that goes back; every step closed in time."""
    worker = WorkerProcess("--trainer-silence-seconds", "0.5")
    try:
        worker.start()
        with WireTrainer(worker.address) as first, WireTrainer(worker.address, rank=1) as other:
            gone = make_hello(world_size=2, topology={"host": "elsewhere", "pid": 1})
            for rank in (first, other):
                rank.greet(gone)
            for step in range(20):
                first.send_step(step)
                other.send_step(step)
            first.send(Notice(text="something to say", code="said", step=19))
            for rank in (first, other):
                rank.wait_for_acks(range(1, rank.sequence + 1))
        wait_until(lambda: len(worker.closed_steps()) == 20, "the first attempt's steps close")
        with WireTrainer(worker.address, incarnation="inc-2") as second:
            second.greet(make_hello(start_step=8))
            for step in range(8, 24):
                second.send_step(step)
            second.goodbye(23, exit_code=3)
            second.wait_for_acks(range(1, second.sequence + 1))
        wait_until(lambda: len(worker.query("SELECT * FROM ending")) == 2, "all end")
        assert worker.terminate() == 0
        yield worker
    finally:
        worker.remove()


def rows(file: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [each["payload"] for each in entries if each["kind"] == "row"]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.sqlite"))}


def values(row: dict[str, Any]) -> dict[str, Any]:
    """What does not hang on when the worker closed a step, or gave a trainer up."""
    return {key: value for key, value in row.items() if not key.startswith(("sidecar/", "_timestamp"))}


def test_the_same_settings_give_the_same_values_as_another_run(recorded: WorkerProcess, tmp_path: Path) -> None:
    before = digests(recorded.journal)
    told: list[Recomputed] = []
    folder, (made,) = recompute(recorded.journal, tmp_path / "out", {}, told.append, deadline_seconds=30.0)
    assert told == [made]
    assert (made.run_id, made.of, made.steps, made.closed_otherwise, made.is_ended) == (
        "run-1-recomputed",
        "run-1",
        36,
        0,
        True,
    )
    recorded_rows = [payload for kind, payload in recorded.outbox() if kind == "row"]
    assert [values(row) for row in rows(tmp_path / "out" / "rows.jsonl")] == [values(row) for row in recorded_rows]
    assert digests(recorded.journal) == before, "the old run is only read"
    rebuilt = Journal(folder, read_only=True)
    run = rebuilt.index.outbox("run-1-recomputed", 0, 1)[0].value()
    assert run["name"] == "small (recomputed)"
    assert run["tags"][-2:] == ["recomputed", "recomputed-from:run-1"]
    assert [each.attempt for each in rebuilt.index.rewinds("run-1-recomputed")] == [1]
    rebuilt.close()


def test_other_settings_judge_anew_and_come_to_a_run_of_their_own(recorded: WorkerProcess) -> None:
    out = recorded.folder / "recomputed"
    done = recorded.run(
        "replay", str(recorded.journal), "--out", str(out), "--recompute", "--set", "answer_length_interval=5",
        "--set", "high_loss_sigmas=0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    name = new_run_id("run-1", {"answer_length_interval": 5, "high_loss_sigmas": 0.1})
    assert f"run run-1: recomputed as {name}: " in done.stdout
    made = rows(out / "rows.jsonl")
    due = {row["train/step"] for row in made if "data/answer_length_mean" in row}
    assert due == {0, 5, 10, 15, 20}
    old = {(row["train/attempt"], row["train/step"]): row for kind, row in recorded.outbox() if kind == "row"}
    again = {(row["train/attempt"], row["train/step"]): row for row in made}
    assert again[0, 3]["loss/total"] == old[0, 3]["loss/total"]
    assert any(
        again[key].get("loss/high_loss_token_ratio") != row.get("loss/high_loss_token_ratio")
        for key, row in old.items()
    )
    (run,) = list(out.glob("wandb/offline-run-*"))
    assert run.name.endswith(name)
    assert (out / "report.html").is_file()


def test_a_detector_that_is_switched_off_makes_no_incident_when_it_is_judged_anew(
    recorded: WorkerProcess, tmp_path: Path
) -> None:
    changes = parse_changes(["detectors.cal_up.enabled=false", "detectors.mass_excess.threshold=0.1"])
    assert changes == {"detectors": {"cal_up.enabled": False, "mass_excess.threshold": 0.1}}
    folder, (made,) = recompute(recorded.journal, tmp_path / "out", changes, lambda _: None, deadline_seconds=30.0)
    rebuilt = Journal(folder, read_only=True)
    (incarnation, *_rest) = rebuilt.index.incarnations(made.run_id)
    record = survey(rebuilt.index, incarnation, 0)
    context, _hello = build_context(rebuilt.index, record)
    rebuilt.close()
    settings = RunSettings.from_map(context.settings)
    assert settings.detectors == changes["detectors"]
    watch, problems = make_watch(settings)
    assert problems == ()
    rules = watch._settings
    assert rules.rule("cal_up") == replace(DetectorSettings().cal_up, enabled=False)
    assert rules.mass_excess.threshold == 0.1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["collapse_verdict=maybe"], "--set collapse_verdict=maybe: 'maybe' is not one of literal, target_relative"),
        (["single_token_dominance=2"], "--set single_token_dominance=2: '2' is not a share from 0 to 1"),
        (["excessive_eos=nan"], "is not a share from 0 to 1"),
        (["collapse_deadline=-1"], "--set collapse_deadline=-1: '-1' is not a whole number, 0 or more"),
        (["collapse_deadline"], "--set collapse_deadline: give it as name=value"),
        (["max_new_tokens=3"], "--set max_new_tokens: the trainer acted by it"),
        (["nonsense=3"], "--set nonsense: no setting of that name is judged by; what can be set is answer_length"),
        (["excessive_eos=0.5", "excessive_eos=0.6"], "--set excessive_eos: is set twice"),
        (["detectors.nothing.hits=2"], "--set detectors.nothing.hits: there is no detector 'nothing'"),
        (["detectors.mass_excess.colour=2"], "mass_excess has no setting 'colour'"),
        (["detectors.mass_excess.threshold=much"], "'much' is not a number"),
        (["detectors.nonfinite.hits=2", "detectors.nonfinite.hits=3"], "is set twice"),
    ],
)
def test_what_cannot_be_set_is_told_with_the_option(given: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_changes(given)
    assert told in str(raised.value)


def test_settings_keep_their_types_and_are_those_that_the_worker_reads() -> None:
    assert parse_changes(["collapse_deadline = 7", "excessive_eos=1", "gradient_detail=module"]) == {
        "collapse_deadline": 7,
        "excessive_eos": 1.0,
        "gradient_detail": "module",
    }
    texts = {str: "literal", int: "3", float: "0.5"}
    for name, convert in SETTABLE.items():
        default = getattr(RunSettings(), name)
        text = default if name == "gradient_detail" else texts[type(default)]
        assert type(convert(text)) is type(default), name


def test_set_needs_recompute(recorded: WorkerProcess) -> None:
    done = recorded.run("replay", str(recorded.journal), "--set", "collapse_deadline=3")
    assert done.returncode == 2
    assert "--set: needs --recompute" in done.stderr


def test_a_step_that_the_deadline_closed_is_closed_by_the_arrivals_clock_again(tmp_path: Path) -> None:
    """Rank 1 brings step 1 long after: recorded by one deadline, recomputed by a longer one."""
    line = Line(tmp_path / "journal")
    clock = [1_700_000_000.0]
    line.reception._clock = lambda: clock[0]
    for rank in (0, 1):
        line.greet(rank=rank, world_size=2)
    for step in range(4):
        clock[0] += 1.0
        line.step(step)
        if step != 1:
            line.step(step, rank=1)
        line.advance(clock[0])
    clock[0] += 35.0
    line.advance(clock[0])
    line.step(1, rank=1)
    for rank in (0, 1):
        line.say(Goodbye(), rank=rank, numbered=True)
    while line.advance(clock[0]).closings:
        pass
    reasons = [each.reason for each in line.journal.index.closings(RUN) if isinstance(each, StepClosing)]
    assert reasons == ["complete", "deadline", "complete", "complete", "tail"]
    line.journal.close()
    for deadline, otherwise in ((30.0, 0), (60.0, 1)):
        out = tmp_path / f"out-{deadline}"
        _, (made,) = recompute(line.folder, out, {}, lambda _made: None, deadline_seconds=deadline)
        assert (made.steps, made.closed_otherwise) == (4, otherwise)


def test_a_run_whose_messages_are_not_kept_any_more_is_named(tmp_path: Path) -> None:
    line = Line(tmp_path / "journal")
    line.greet()
    line.steps_of(range(3))
    line.journal.close()
    with closing(sqlite3.connect(line.folder / "index.sqlite")) as connection, connection:
        connection.execute("INSERT INTO segment_deleted VALUES (1, 0, 7, 8, 100, 0.0)")
        ranges = np_ranges([(1, 8)])
        connection.execute("INSERT INTO stream_range VALUES (0, 'inc', 0, ?, 7)", (ranges,))
    with pytest.raises(
        JournalError, match=r"run run cannot be recomputed: 8 of its raw messages are not kept any more"
    ):
        recompute(line.folder, tmp_path / "out", {}, lambda _made: None, deadline_seconds=30.0)
    assert not (tmp_path / "out").exists()


def np_ranges(ranges: list[tuple[int, int]]) -> bytes:
    return np.array(ranges, "<i8").tobytes()
