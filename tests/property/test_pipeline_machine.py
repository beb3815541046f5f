"""Ranks, restarts, deadlines, repeats, refusals and ways back in any order: what has to hold holds.

Every message is used once, every step of an attempt closes once, the outbox has no gap, a restart knows what the worker
before it knew, ways back count each answer once (by a plain recount), and a replay gives the same bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.support.message_line import DEADLINE_SECONDS, RUN, Line, replayed
from tests.support.run_balance import check_run, num_answers
from tests.support.wire_trainer import make_hello, step_messages

from sidestep.protocol.frames import encode
from sidestep.protocol.messages import Answers, Goodbye, Message, Notice
from sidestep.worker.intake import state_history
from sidestep.worker.intake.decisions import Rewind
from sidestep.worker.pipeline import QUIET_SECONDS
from sidestep.worker.records import StepClosing

MAX_ATTEMPTS = 4
RANKS = st.integers(0, 1)
CUT_BYTES = 5


class Machine(RuleBasedStateMachine):
    """Two ranks at most, some attempts, and one worker that is made anew now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(state_history, "SNAPSHOT_CLOSINGS", 8)
        self.folder = Path(tempfile.mkdtemp(prefix="ss-"))
        self.line = Line(self.folder / "journal")
        self.now = 0.0
        self.attempts: list[tuple[str, int]] = []  # incarnation, world size
        self.next_step: dict[tuple[str, int], int] = {}
        self.wire: list[tuple[str, int, bytes]] = []
        self.sent: list[tuple[str, int, bytes]] = []
        self.silent: set[tuple[str, int]] = set()

    # ------------------------------------------------------------------------------------------------ trainers

    @initialize(world_size=st.integers(1, 2))
    def begin(self, world_size: int) -> None:
        self._start(world_size, 0)

    def _start(self, world_size: int, first: int) -> None:
        name = f"inc-{len(self.attempts)}"
        self.attempts.append((name, world_size))
        for rank in range(world_size):
            self.next_step[name, rank] = first
        self.line.greet(name, rank=0, world_size=world_size)

    @precondition(lambda self: len(self.attempts) < MAX_ATTEMPTS)
    @rule(world_size=st.integers(1, 2), back=st.integers(-2, 12))
    def come_back(self, world_size: int, back: int) -> None:
        reached = max(self.next_step.values())
        self._start(world_size, max(0, reached - back))

    @rule(rank=RANKS, older=st.integers(0, 1), num_steps=st.integers(1, 4), word=st.booleans())
    def train(self, rank: int, older: int, num_steps: int, word: bool) -> None:
        name, world_size = self.attempts[max(0, len(self.attempts) - 1 - older)]
        rank %= world_size
        if (name, rank) in self.silent:
            return
        for _ in range(num_steps):
            step = self.next_step[name, rank]
            self.next_step[name, rank] = step + 1
            said: list[Message] = [*([Notice(text=f"at {step}", step=step)] if word else []), *step_messages(step)]
            for message in said:
                self._say(message, name, rank)

    def _say(self, message: Message, name: str, rank: int) -> None:
        envelope = self.line.envelope(name, rank, self.line.number(name, rank))
        self.wire.append((name, rank, encode(envelope, message)))

    @rule(rank=RANKS)
    def end(self, rank: int) -> None:
        name, world_size = self.attempts[-1]
        rank %= world_size
        if (name, rank) not in self.silent:
            self.silent.add((name, rank))
            self._say(Goodbye(newest_step=self.next_step[name, rank] - 1), name, rank)

    @rule(rank=RANKS)
    def greet_late(self, rank: int) -> None:
        name, world_size = self.attempts[-1]
        self.line.say(make_hello(world_size=world_size), name, rank=rank % world_size)

    # ------------------------------------------------------------------------------------------------ the wire

    @precondition(lambda self: self.wire)
    @rule(picks=st.lists(st.integers(0, 7), min_size=1, max_size=12))
    def deliver(self, picks: list[int]) -> None:
        for pick in picks:
            if self.wire:
                self._arrive(self.wire.pop(min(pick, len(self.wire) - 1)))
        self._advance()

    @precondition(lambda self: self.wire)
    @rule()
    def deliver_all(self) -> None:
        for each in self.wire:
            self._arrive(each)
        self.wire = []
        self._advance()

    def _arrive(self, each: tuple[str, int, bytes]) -> None:
        name, rank, frame = each
        self.line.bring(frame, name, rank)
        self.sent.append(each)

    @precondition(lambda self: self.sent)
    @rule(pick=st.integers(0, 1_000))
    def deliver_again(self, pick: int) -> None:
        name, rank, frame = self.sent[pick % len(self.sent)]
        self.line.bring(frame, name, rank)

    @precondition(lambda self: self.wire)
    @rule(pick=st.integers(0, 7))
    def break_a_frame(self, pick: int) -> None:
        """It is refused, and the publisher lets go of it."""
        name, rank, frame = self.wire.pop(min(pick, len(self.wire) - 1))
        refused = self.line.reception.statistics().get("refused", 0)
        self.line.bring(frame[:-CUT_BYTES], name, rank)
        assert self.line.reception.statistics().get("refused", 0) == refused + 1

    # ------------------------------------------------------------------------------------------------ the worker

    def _advance(self, lost: Mapping[str, str] | None = None) -> None:
        while self.line.advance(self.now, dict(lost or {})).closings:
            pass

    @rule(seconds=st.sampled_from([0.1, QUIET_SECONDS, DEADLINE_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self._advance()

    @precondition(lambda self: self.line.journal.index.contexts(RUN))
    @rule()
    def restart(self) -> None:
        self._advance()
        before = self._state()
        self.line.restart()
        assert self._state() == before, "a restart knows what the worker before it knew"

    def _state(self) -> bytes:
        projection = self.line.pipelines[RUN]._projector._projection
        assert projection is not None
        return projection.state()

    # ------------------------------------------------------------------------------------------------ at the end

    def teardown(self) -> None:
        try:
            if self.attempts:
                self._finish()
                self._check()
        finally:
            self.line.journal.close()
            shutil.rmtree(self.folder)
            self.patch.undo()

    def _finish(self) -> None:
        for each in self.wire:
            self._arrive(each)
        self.wire = []
        lost = {name: "it is over" for name, _ in self.attempts}
        for _ in range(2 * MAX_ATTEMPTS):
            self.now += DEADLINE_SECONDS
            self._advance(lost)
        assert self.line.is_ended()

    def _check(self) -> None:
        check_run(self.line.journal, RUN)
        rows = [each.value() for each in self.line.journal.index.outbox(RUN, 0, 100_000) if each.kind == "row"]
        shown = {
            (row["train/attempt"], row["train/step"]): num_answers(row)
            for row in rows
            if "data/answer_length_histogram" in row
        }
        assert shown == {key: count for key, count in recount(self.line).items() if key in shown}
        assert all(each.is_exact for each in self.line.journal.index.rewinds(RUN))
        assert replayed(self.line, self.folder / "replayed").is_identical


class Recount:
    """The epoch's answers after each closing, counted from the recorded decisions alone."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.counted: Counter[tuple[int, int]] = Counter()  # attempt, step of the answers
        self.after: dict[int, tuple[int, Counter[tuple[int, int]]]] = {}  # closing to its attempt and what it left
        self.late: list[tuple[int, int, int]] = []  # closing, attempt, step of the answers
        self.starts: dict[int, int] = {}

    def go_back(self, rewind: Rewind) -> None:
        source, counted = self.after.get(rewind.source_number, (-1, Counter()))
        self.counted = Counter(counted)
        for number, attempt, step in self.late:
            if attempt == source and number > rewind.source_number and step < rewind.step:
                self.counted[attempt, step] += 1
        self.starts = {attempt: start for attempt, start in self.starts.items() if attempt <= source}

    def close(self, closing: StepClosing) -> int:
        if closing.reason != "tail" and closing.attempt > max(self.starts, default=-1):
            self.starts[closing.attempt] = closing.step
        messages = self.line.journal.messages_of(closing)
        for key in (*closing.parts, *closing.late_parts):
            message: Any = messages[key].message
            if isinstance(message, Answers):
                self._count(closing, message.step, is_late=key in closing.late_parts)
        self.after[closing.closed_number] = closing.attempt, Counter(self.counted)
        return self.counted.total()

    def _count(self, closing: StepClosing, step: int, *, is_late: bool) -> None:
        if is_late:
            self.late.append((closing.closed_number, closing.attempt, step))
        if not any(step >= start for later, start in self.starts.items() if later > closing.attempt):
            self.counted[closing.attempt, step] += 1


def recount(line: Line) -> dict[tuple[int, int], int]:
    """Return (attempt, step) to the answers of the epoch after it."""
    made, totals = Recount(line), {}
    for decision in line.journal.index.closings(RUN):
        if isinstance(decision, Rewind):
            made.go_back(decision)
        elif isinstance(decision, StepClosing):
            total = made.close(decision)
            if decision.reason != "tail":
                totals[decision.attempt, decision.step] = total
    return totals


TestMachine = pytest.mark.timeout(150)(Machine.TestCase)
TestMachine.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
