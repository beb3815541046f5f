"""Whatever the order of arrival: every step closes once, whole and in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.wire_trainer import step_messages

from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Goodbye, Kind
from sidestep.worker.intake.assembler import Assembler
from sidestep.worker.intake.assembly import Journaled
from sidestep.worker.intake.decisions import Incarnation

NUM_STEPS, WORLD_SIZE = 3, 2


def streams() -> list[Journaled]:
    messages: list[Journaled] = []
    for rank in range(WORLD_SIZE):
        said = [message for step in range(NUM_STEPS) for message in step_messages(step)]
        for sequence, message in enumerate([*said, Goodbye(newest_step=NUM_STEPS - 1)], 1):
            envelope = Envelope(run_id="run", incarnation="inc", rank=rank, sequence=sequence)
            messages.append(Journaled(envelope=envelope, message=message, arrival=len(messages)))
    return messages


MESSAGES = streams()


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(len(MESSAGES))))
def test_any_order_closes_every_step_whole_and_in_order(order: list[int]) -> None:
    incarnation = Incarnation(
        incarnation="inc", run_id="run", attempt=0, first_seen=0.0, world_size=WORLD_SIZE, start_step=0
    )
    assembler = Assembler(incarnation, deadline_seconds=30.0)
    closed = []
    for at in order:
        assembler.add(MESSAGES[at], 0.0)
        closed += assembler.close_ready(0.0, ended=assembler.has_ended(0.0))
    assert [(each.closing.step, each.closing.reason) for each in closed] == [
        (step, "complete") for step in range(NUM_STEPS)
    ]
    for each in closed:
        assert {kind: len(parts) for kind, parts in each.step.parts.items()} == {
            Kind.LEARNING_RATES: WORLD_SIZE,
            Kind.LOSSES: WORLD_SIZE,
            Kind.ANSWERS: WORLD_SIZE,
        }
        assert [part.rank for part in each.step.parts[Kind.LOSSES]] == [0, 1]
        assert each.step.late_parts == ()
    assert assembler.has_ended(0.0)
    assert not assembler.has_leftovers()
