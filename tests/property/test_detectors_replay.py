"""A watch that is saved and restored at any step says the same, byte for byte, as one that never stopped; and whatever
a trainer sends, it neither raises nor keeps more than its bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.detector_traces import Drawn, Task, context, to_one_token, trace

from sidestep.protocol.messages import Gradients, Kind, Losses, Message, Probe, Scalars, Signals, StepEnd
from sidestep.protocol.tables import encode_table
from sidestep.worker.detectors.families import make_families
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.metrics.sequences import GeneratedSamples, TokenSequence
from sidestep.worker.record_building import build_record
from sidestep.worker.records import AssembledStep, Part
from sidestep.worker.step_record import MAX_RECORD_BYTES, StepRecord
from sidestep.worker.watch import Watch, WatchVerdict

MAX_STATE_BYTES = 256 << 10
UNHURRIED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def told(verdict: WatchVerdict) -> bytes:
    parts = [
        dict(verdict.values), dict(verdict.companions), dict(verdict.readings),
        [[a.code, a.title, a.level, a.line, list(a.block), a.is_alert] for a in verdict.announcements],
        [[table.key, list(table.columns), [list(row) for row in table.rows]] for table in verdict.tables],
        [[each.action, each.reason] for each in verdict.requests],
        [each.text for each in verdict.notices],
    ]  # fmt: skip
    return encode_table(parts)


def story(drawn: Drawn) -> None:
    """A run with a stage, a skipped step and a collapse."""
    drawn.stage = "second" if drawn.step == 40 else ""
    drawn.applied = drawn.step % 13 != 5
    if drawn.step >= 190:
        to_one_token(0.9)(drawn)


@pytest.fixture(scope="module")
def steps() -> list[AssembledStep]:
    return list(trace(Task(ranks=2, batch=16), 220, failure=story))


def test_a_restart_at_every_step_changes_nothing(steps: list[AssembledStep]) -> None:
    straight, restarted = Watch(), Watch()
    where = context()
    spoke = 0
    for step in steps:
        saved = encode_table(restarted.state())
        state = restarted.state()
        restarted = Watch()
        restarted.restore(state)
        assert encode_table(restarted.state()) == saved
        first, second = straight.observe(step, where), restarted.observe(step, where)
        assert told(first) == told(second)
        spoke += len(first.announcements)
    assert spoke, "the story has something to tell"
    assert encode_table(straight.state()) == encode_table(restarted.state())


def test_a_replay_of_records_says_what_the_run_said(steps: list[AssembledStep]) -> None:
    live, replayed = Watch(), Watch()
    where = context()
    for step in steps:
        record = StepRecord.from_bytes(build_record(step, where).as_bytes())
        assert told(live.observe(step, where)) == told(replayed.observe_record(record, where))
    assert encode_table(live.state()) == encode_table(replayed.state())


def test_every_family_forgets_to_what_it_was(steps: list[AssembledStep]) -> None:
    """Nothing is judged against what was before an announced stage."""
    kept = {"exact", "images", "absolute", "gradients", "updates", "repeats", "generation"}
    watch, where = Watch(), context()
    for step in steps[:38]:
        watch.observe(step, where)
    fresh = {family.name: family.state() for family in make_families(DetectorSettings())}
    for family in watch._families:
        family.forget()
        if family.name not in kept:
            assert encode_table(family.state()) == encode_table(fresh[family.name]), family.name


def test_the_state_stays_within_its_bound() -> None:
    watch, where = Watch(), context()
    rng = np.random.default_rng(0)
    for step in trace(Task(options=500, length=30, batch=32), 24):
        (part,) = step.parts[Kind.SIGNALS]
        ids = rng.integers(0, 150_000, part.message.targets.size).astype(np.int32)  # type: ignore[attr-defined]
        sent = replace(part.message, targets=ids, predictions=ids, vocabulary=150_000)  # type: ignore[call-arg]
        watch.observe(replace(step, parts={Kind.SIGNALS: (Part(rank=0, message=sent),)}), where)
    assert len(encode_table(watch.state())) <= MAX_STATE_BYTES


def array_of(draw: st.DrawFn, dtype: str, low: float, high: float) -> Any:
    size = draw(st.sampled_from([0, 1, 3, 20, 20, 20, 20, 300]))
    if np.dtype(dtype).kind == "f":
        some = st.sampled_from([0.0, 1.0, 0.5, 3.0, -1.0, np.nan, np.inf, -np.inf, 1e-30, 60_000.0])
        return np.resize(np.array(draw(st.lists(some, min_size=1, max_size=6))), size).astype(dtype)
    some_ints = st.sampled_from([int(low), int(high), 0, 1, 2, 3, 10])
    return np.resize(np.array(draw(st.lists(some_ints, min_size=1, max_size=6)), "i8"), size).astype(dtype)


FLOATS = st.sampled_from([-1.0, 0.0, 0.3, 1.0, 7.0, float("nan"), float("inf"), -float("inf"), 1e300])
INTS = st.sampled_from([-(2**62), -1, 0, 1, 5, 100, 2**62])


@st.composite
def hostile_signals(draw: st.DrawFn, step: int) -> Signals:
    values: dict[str, Any] = {
        "counts": array_of(draw, "i8", -1, 2**60),
        "targets": array_of(draw, "i4", -1, 2**31 - 1),
        "predictions": array_of(draw, "i4", -1, 2**31 - 1),
        "losses": array_of(draw, "f2", 0, 0),
        "entropies": array_of(draw, "f2", 0, 0),
        "eos_probabilities": array_of(draw, "f2", 0, 0),
        "places": array_of(draw, "u1", 0, 255),
        "answers": array_of(draw, "u2", 0, 65_535),
        "mean_ids": array_of(draw, "i4", -1, 2**31 - 1),
        "mean_probabilities": array_of(draw, "f4", 0, 0),
        "trainer_losses": array_of(draw, "f4", 0, 0),
        "sample_hashes": array_of(draw, "i8", -(2**62), 2**62),
        "image_hashes": array_of(draw, "i8", -(2**62), 2**62),
        "image_deviations": array_of(draw, "f4", 0, 0),
        "gradient_norm": array_of(draw, "f4", 0, 0),
        "module_norms": array_of(draw, "f4", 0, 0),
        "heartbeat": array_of(draw, "f4", 0, 0),
        "rates": array_of(draw, "f8", 0, 0),
        "labelled": draw(INTS),
        "vocabulary": draw(INTS),
        "top_probability": draw(FLOATS),
        "projector_rms": draw(FLOATS),
        "projector_spread": draw(FLOATS),
        "step_seconds": draw(FLOATS),
        "wait_seconds": draw(FLOATS),
    }
    return Signals(step=step, **values)


@st.composite
def hostile_runs(draw: st.DrawFn) -> list[AssembledStep]:
    found = []
    for step in range(draw(st.integers(1, 6))):
        sent: list[tuple[int, Message]] = [
            (rank, draw(hostile_signals(step))) for rank in range(draw(st.integers(0, 3)))
        ]
        if draw(st.booleans()):
            sent.append(
                (0, Probe(step=step, loss=draw(FLOATS), rolled_loss=draw(FLOATS), labelled=draw(INTS), images=2))
            )
        if draw(st.booleans()):
            odd = {"a": draw(FLOATS), "b": "text", "c": None, "d": True, "e" * 99: 1.0, "f": 10**400}
            sent.append((0, Scalars(step=step, values=odd)))
        if draw(st.booleans()):
            partials = np.resize(array_of(draw, "f8", 0, 0), 10) if draw(st.booleans()) else np.zeros(0)
            sent.append((0, Losses(step=step, microstep=0, labelled=1, partials=partials)))
        if draw(st.booleans()):
            empty = np.zeros(0)
            sent.append(
                (0, Gradients(
                    step=step, parameters=empty.astype("i4"), counts=empty.astype("i8"), zeros=empty.astype("i8"),
                    nonfinite=array_of(draw, "i8", -1, 9), exponents=empty.astype("i4"), means=empty, m2=empty,
                    absmax=empty,
                ))
            )  # fmt: skip
        parts: dict[Kind, tuple[Part, ...]] = {}
        for rank, message in sent:
            parts[Kind(message.kind)] = (*parts.get(Kind(message.kind), ()), Part(rank=rank, message=message))
        end = StepEnd(step=step, unix_time=0.0, applied=draw(st.booleans()), stage="x" * draw(st.integers(0, 300)))
        ends = {0: end} if draw(st.booleans()) else {}
        found.append(AssembledStep(run_id="run", attempt=0, step=step, reason="complete", parts=parts, ends=ends))
    return found


@UNHURRIED
@given(run=hostile_runs())
def test_whatever_is_sent_is_judged_the_same_and_raises_nothing(run: list[AssembledStep]) -> None:
    where = context()
    straight, restarted = Watch(), Watch()
    for step in run:
        record = build_record(step, where)
        content = record.as_bytes()
        assert len(content) <= MAX_RECORD_BYTES
        assert StepRecord.from_bytes(content) == record
        state = restarted.state()
        restarted = Watch()
        restarted.restore(state)
        assert told(straight.observe(step, where)) == told(restarted.observe(step, where))
    assert encode_table(straight.state()) == encode_table(restarted.state())


@UNHURRIED
@given(ids=st.lists(st.lists(st.integers(-5, 5), max_size=80), max_size=6), limit=st.integers(-3, 70))
def test_whatever_is_generated_is_judged(ids: list[list[int]], limit: int) -> None:
    targets = [{"target_ids": [1, 2, 3]} for _ in ids]
    generated = GeneratedSamples(
        samples=tuple(range(len(ids))),
        sequences=tuple(TokenSequence(content=tuple(each), has_ended=bool(each)) for each in ids),
        max_new_tokens=limit,
    )
    step = AssembledStep(run_id="run", attempt=0, step=0, reason="complete")
    Watch().observe(step, context(samples={"samples": targets}), generated=generated)
