"""Lanes, window, ledger and accounts together, driven by random submissions, sends, acks, refusals and reconnects."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sidestep.protocol import frames
from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import (
    Generation,
    Goodbye,
    Gradients,
    Heartbeat,
    Kind,
    Losses,
    Message,
    Notice,
    Scalars,
    StepEnd,
    Tokens,
)
from sidestep.trainer_hooks.delivery import Delivery
from sidestep.trainer_hooks.lanes import NEVER_DROPPED

IDENTITY = Envelope(run_id="run", incarnation="one", rank=0)


def losses(step: int, num_tokens: int = 4) -> Losses:
    return Losses(step=step, microstep=0, labelled=num_tokens, losses=np.ones(num_tokens, np.float32))


def tokens(step: int, num_ids: int = 4) -> Tokens:
    ids = np.arange(num_ids, dtype=np.int32)
    counts = np.ones(num_ids, np.int64)
    return Tokens(
        step=step,
        microstep=0,
        positions=num_ids,
        padding=0,
        answers=1,
        real_ids=ids,
        real_counts=counts,
        labelled_ids=ids,
        labelled_counts=counts,
        content_counts=counts,
    )


def generation(step: int, num_ids: int = 4) -> Generation:
    return Generation(
        step=step,
        samples=np.zeros(1, np.int32),
        offsets=np.array([0, num_ids], np.int64),
        ids=np.zeros(num_ids, np.int32),
    )


MAKERS = {"losses": losses, "tokens": tokens, "generation": generation}


@dataclass
class Wire:
    """What left, by sequence number."""

    first_frames: dict[int, bytes] = field(default_factory=dict)
    messages: dict[int, Message] = field(default_factory=dict)

    def carry(self, delivery: Delivery, num_frames: int) -> int:
        """Send up to ``num_frames`` frames (none is large enough for chunks)."""
        for sent in range(num_frames):
            frame = delivery.next_frame()
            if frame is None:
                return sent
            envelope, message = frames.decode(frame)
            assert isinstance(message, Message)
            assert self.first_frames.setdefault(envelope.sequence, frame) == frame, "a resend is the same bytes"
            self.messages[envelope.sequence] = message
            delivery.frame_sent()
        return num_frames


def newest_ends(messages: dict[int, Message]) -> dict[int, StepEnd]:
    return {m.step: m for _, m in sorted(messages.items()) if isinstance(m, StepEnd)}


class DeliveryMachine(RuleBasedStateMachine):
    """The sum of the accounts, the bound, and honest ``StepEnd``s, at every instant."""

    @initialize(window_bytes=st.sampled_from([3_000, 20_000, 200_000]))
    def start(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        self.delivery = Delivery(IDENTITY, window_bytes=window_bytes)
        self.wire = Wire()
        self.settled: set[int] = set()
        self.refused: Counter[tuple[int, str]] = Counter()
        self.step = 0
        self.handed: Counter[str] = Counter()
        self.ends: dict[int, Counter[str]] = {}
        self.produced: Counter[Kind] = Counter()

    def submit(self, message: Message) -> None:
        self.delivery.take(message)
        self.produced[message.kind] += 1

    @rule(kind=st.sampled_from(sorted(MAKERS)), size=st.sampled_from([1, 50, 400, 3_000]))
    def part(self, kind: str, size: int) -> None:
        self.submit(MAKERS[kind](self.step, size))
        self.handed[kind] += 1

    @rule()
    def unencodable_part(self) -> None:
        self.submit(Scalars(step=self.step, values={"bad": object()}))
        self.handed["scalars"] += 1

    @rule()
    def notice(self) -> None:
        self.submit(Notice(text="hello"))

    @rule(kind=st.sampled_from([Kind.TOKENS, Kind.LOSSES]), announced=st.booleans())
    def skipped(self, kind: Kind, announced: bool) -> None:
        self.delivery.skip(kind, self.step, announced=announced)
        self.produced[kind] += 1
        if announced:
            self.handed[kind.name.lower()] += 1

    @rule(age=st.integers(0, 3))
    def staged_part_fails_late(self, age: int) -> None:
        step = self.step - 1 - age
        if step in self.ends:
            self.delivery.skip(Kind.LOSSES, step, announced=True)
            self.produced[Kind.LOSSES] += 1
            self.ends[step]["skipped_late"] += 1

    @rule()
    def end_step(self) -> None:
        # one part of losses is announced for a staged copy that may still fail
        sent = dict(self.handed + Counter(losses=4))
        self.submit(StepEnd(step=self.step, unix_time=1.0, sent=sent))
        self.ends[self.step] = Counter(sent)
        self.handed = Counter()
        self.step += 1

    @rule(num_frames=st.integers(1, 12))
    def send(self, num_frames: int) -> None:
        self.wire.carry(self.delivery, num_frames)

    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        waiting = sorted(set(self.wire.messages) - self.settled)
        if waiting:
            chosen = data.draw(st.sets(st.sampled_from(waiting), min_size=1))
            ranges = np.array([[number, number] for number in sorted(chosen)], np.int64)
            assert self.delivery.acknowledge(ranges) == len(chosen)
            assert self.delivery.acknowledge(ranges) == 0, "an ack that comes twice settles nothing"
            self.settled |= chosen

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        waiting = sorted(set(self.wire.messages) - self.settled)
        if waiting:
            sequence = data.draw(st.sampled_from(waiting))
            assert self.delivery.refuse(sequence)
            assert not self.delivery.refuse(sequence)
            self.settled.add(sequence)
            message = self.wire.messages[sequence]
            if isinstance(message, Losses | Tokens):
                self.refused[message.step, message.kind.name.lower()] += 1

    @rule()
    def reconnect(self) -> None:
        self.delivery.resend()

    @invariant()
    def accounts_are_exact(self) -> None:
        accounts = self.delivery.accounts()
        for account in accounts.values():
            assert account.produced == account.accepted + account.refused + account.dropped + account.in_window
            assert min(account.accepted, account.refused, account.dropped, account.in_window) >= 0
        for kind, count in self.produced.items():
            if kind is not Kind.STEP_END:
                assert accounts[kind].produced == count
        assert sum(a.accepted + a.refused for a in accounts.values()) == len(self.settled)
        assert sum(a.in_window for a in accounts.values()) == self.delivery.num_unsent + self.delivery.num_unacked

    @invariant()
    def what_was_sent_stays_until_it_is_settled(self) -> None:
        assert self.delivery.num_unacked >= len(set(self.wire.messages) - self.settled)

    @invariant()
    def bounded(self) -> None:
        accounts = self.delivery.accounts()
        num_ends = sum(account.in_window for kind, account in accounts.items() if kind in NEVER_DROPPED)
        assert self.delivery.size_bytes <= self.window_bytes + num_ends * 1_500

    def teardown(self) -> None:
        while self.wire.carry(self.delivery, 100):
            pass
        ends = newest_ends(self.wire.messages)
        assert set(ends) == set(self.ends), "no StepEnd is ever dropped"
        left = Counter(
            (m.step, m.kind.name.lower()) for m in self.wire.messages.values() if isinstance(m, Losses | Tokens)
        )
        for step, end in ends.items():
            announced_and_late = 4 - self.ends[step]["skipped_late"]
            for name in ("losses", "tokens"):
                staged = max(0, announced_and_late) if name == "losses" else 0
                if name == "losses" and self.ends[step]["skipped_late"] > 4:
                    continue
                assert end.sent.get(name, 0) - staged == left[step, name] - self.refused[step, name]
                handed = self.ends[step][name] - self.refused[step, name]
                assert end.sent.get(name, 0) + end.dropped.get(name, 0) == handed


DeliveryMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestDelivery = DeliveryMachine.TestCase


def carried(delivery: Delivery) -> list[Message]:
    wire = Wire()
    while wire.carry(delivery, 100):
        pass
    return [message for _, message in sorted(wire.messages.items())]


def test_messages_leave_in_order_of_arrival_over_all_lanes() -> None:
    delivery = Delivery(IDENTITY)
    for message in (generation(1), losses(1), tokens(1), StepEnd(step=1, unix_time=0.0), Goodbye()):
        delivery.take(message)
    assert [m.kind for m in carried(delivery)] == [
        Kind.GENERATION,
        Kind.LOSSES,
        Kind.TOKENS,
        Kind.STEP_END,
        Kind.GOODBYE,
    ]


def test_tables_go_first_then_statistics_then_losses() -> None:
    delivery = Delivery(IDENTITY, window_bytes=14_000)
    for message in (generation(1, 300), tokens(1, 50), losses(1, 300), losses(1, 300), losses(1, 300), losses(1, 300)):
        delivery.take(message)
    kinds = [m.kind for m in carried(delivery)]
    assert Kind.GENERATION not in kinds
    assert Kind.TOKENS not in kinds
    assert kinds.count(Kind.LOSSES) == 4


def gradients(step: int, num_nonfinite: int) -> Gradients:
    rows = 300
    whole, moments = np.zeros(rows, np.int64), np.zeros(rows, np.float64)
    nonfinite = whole.copy()
    nonfinite[7] = num_nonfinite
    return Gradients(
        step=step, parameters=np.arange(rows, dtype=np.int32), counts=whole, nonfinite=nonfinite, zeros=whole,
        exponents=np.zeros(rows, np.int32), means=moments, m2=moments, absmax=moments,
    )  # fmt: skip


def test_non_finite_gradients_are_as_dear_as_losses() -> None:
    delivery = Delivery(IDENTITY, window_bytes=45_000)
    delivery.take(gradients(1, 2))
    delivery.take(gradients(2, 0))
    delivery.take(losses(3))
    delivery.take(gradients(4, 0))
    assert [m.step for m in carried(delivery) if isinstance(m, Gradients)] == [1, 4], "the oldest finite one has gone"


def test_a_message_that_cannot_fit_evicts_nobody() -> None:
    delivery = Delivery(IDENTITY, window_bytes=10_000)
    delivery.take(generation(1, 100))
    delivery.take(losses(1, 100_000))
    assert [m.kind for m in carried(delivery)] == [Kind.GENERATION]
    assert delivery.accounts()[Kind.LOSSES].dropped == 1


def test_a_step_end_counts_what_was_evicted_before_it_left() -> None:
    delivery = Delivery(IDENTITY, window_bytes=6_000)
    for _ in range(8):
        delivery.take(tokens(7, 20))
    delivery.take(StepEnd(step=7, unix_time=0.0, sent={"tokens": 8}, dropped={"tokens": 1, "losses": 2}))
    messages = carried(delivery)
    num_tokens = sum(m.kind is Kind.TOKENS for m in messages)
    end = newest_ends(dict(enumerate(messages)))[7]
    assert 0 < num_tokens < 8
    assert end.sent == {"tokens": num_tokens}
    assert end.dropped == {"tokens": 9 - num_tokens, "losses": 2}


def test_a_step_end_that_has_left_is_corrected_once_for_many_evictions() -> None:
    delivery = Delivery(IDENTITY, window_bytes=20_000)
    delivery.take(StepEnd(step=3, unix_time=0.0, sent={"generation": 2}))
    first = carried(delivery)
    delivery.take(generation(3, 100))  # finished by staging after the step's end had left
    delivery.take(generation(3, 100))
    for _ in range(10):
        delivery.take(losses(4, 400))
    second = carried(delivery)
    assert isinstance(first[0], StepEnd)
    assert dict(first[0].sent) == {"generation": 2}
    ends = [m for m in second if isinstance(m, StepEnd)]
    assert [(dict(end.sent), dict(end.dropped)) for end in ends] == [({"generation": 0}, {"generation": 2})]


def test_a_step_does_not_wait_for_a_part_that_was_refused() -> None:
    delivery = Delivery(IDENTITY)
    delivery.take(tokens(5))
    delivery.take(losses(5))
    delivery.take(StepEnd(step=5, unix_time=0.0, sent={"tokens": 1, "losses": 1}))
    wire = Wire()
    wire.carry(delivery, 100)
    assert delivery.refuse(next(number for number, m in wire.messages.items() if isinstance(m, Losses)))
    (end,) = carried(delivery)
    assert isinstance(end, StepEnd)
    assert (dict(end.sent), dict(end.dropped)) == ({"tokens": 1, "losses": 0}, {})


def test_heads_carry_the_accounts_of_the_moment_of_the_first_send() -> None:
    delivery = Delivery(IDENTITY)
    delivery.take(tokens(1))
    delivery.skip(Kind.TOKENS, 1, announced=False)
    frame = delivery.next_frame()
    assert frame is not None
    assert frames.decode(frame)[0].accounts == {"tokens": (2, 1, 0)}
    delivery.frame_sent()
    delivery.take(losses(1))
    delivery.resend()
    assert delivery.next_frame() == frame


def test_large_messages_travel_in_chunks_and_start_over_on_another_connection() -> None:
    delivery = Delivery(IDENTITY)
    delivery.take(losses(1, 200_000))
    joiner = frames.ChunkJoiner()
    for _ in range(2):
        frame = delivery.next_frame()
        assert frame is not None
        assert joiner.add(frame)[1] is None
        delivery.frame_sent()
    delivery.resend()
    joiner = frames.ChunkJoiner()  # another worker, which has none of it
    whole = None
    while (frame := delivery.next_frame()) is not None:
        whole = joiner.add(frame)[1] or whole
        delivery.frame_sent()
    assert whole is not None
    envelope, message = frames.decode(whole)
    assert envelope.sequence == 1
    assert isinstance(message, Losses)
    assert len(message.losses) == 200_000


def test_what_has_no_sequence_number_is_not_taken_and_said_once() -> None:
    said: list[str] = []
    delivery = Delivery(IDENTITY, complain=lambda code, _text: said.append(code))
    delivery.take(Heartbeat())
    assert delivery.next_frame() is None
    assert said == ["unsequenced"]


def test_abandoning_counts_everything_as_dropped() -> None:
    delivery = Delivery(IDENTITY)
    for step in range(5):
        delivery.take(losses(step))
    Wire().carry(delivery, 2)
    assert delivery.abandon() == 5
    assert delivery.accounts()[Kind.LOSSES].dropped == 5
    assert delivery.size_bytes == 0
    assert delivery.next_frame() is None


@pytest.mark.parametrize("window_bytes", [0, -1])
def test_a_window_without_room_is_refused(window_bytes: int) -> None:
    with pytest.raises(ValueError, match="window_bytes"):
        Delivery(IDENTITY, window_bytes=window_bytes)
