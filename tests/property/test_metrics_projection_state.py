"""A projection that is saved and restored at every step says the same, byte for byte, as one that never stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidestep.protocol.messages import Answers, Generation, Kind, Losses, Message, Notice, Scalars, StepEnd
from sidestep.worker.projection import RunProjection
from sidestep.worker.records import AssembledStep, Part, RunContext

EOS = 0
UNHURRIED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on busy cores


class Numbers:
    """Ids as numbers."""

    def token(self, token_id: int) -> str:
        return f"t{token_id}"

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(map(self.token, ids))


SETTINGS = {
    "generation_eval_interval": 2,
    "collapse_detection_interval": 1,
    "answer_length_interval": 2,
    "collapse_deadline": 6,
}


def context(attempt: int) -> RunContext:
    table = {"eos_id": EOS, "vocabulary_size": 20}
    return RunContext(run_id="run", attempt=attempt, text=Numbers(), tokenizer=table, settings=SETTINGS)


@st.composite
def messages(draw: st.DrawFn, step: int, attempt: int) -> AssembledStep:
    """One step with what a trainer may send of it, sound or not."""
    sent: list[Message] = []
    lengths = np.array(sorted(draw(st.sets(st.integers(0, 5), max_size=3))), np.int32)
    counts = np.array([draw(st.integers(-1 if draw(st.booleans()) else 0, 3)) for _ in lengths], np.int64)
    without = draw(st.integers(0, 1))
    sent.append(
        Answers(
            step=step, epoch=step // 4, lengths=lengths, counts=counts, labelled=1, batches=1,
            batches_without_labels=without,
        )
    )  # fmt: skip
    if draw(st.booleans()):
        outputs = draw(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=3))
        ids = np.array([i for ids in outputs for i in ids], np.int32)
        offsets = np.array([0, *np.cumsum([len(ids) for ids in outputs])], np.int64)
        sent.append(Generation(step=step, samples=np.arange(len(outputs), dtype=np.int32), offsets=offsets, ids=ids))
    if draw(st.booleans()):
        losses = np.array(draw(st.lists(st.floats(width=32), max_size=3)), np.float32)
        roles = np.full(draw(st.integers(0, 3)), 1, np.uint8)
        targets = np.arange(losses.size, dtype=np.int32)
        sent.append(
            Losses(step=step, microstep=0, labelled=losses.size, losses=losses, target_ids=targets, roles=roles)
        )
    if draw(st.booleans()):
        logged = draw(
            st.dictionaries(st.sampled_from(["a", "b", "train/step"]), st.floats() | st.booleans(), max_size=2)
        )
        sent.append(Scalars(step=step, values=logged, step_key=draw(st.sampled_from(["", "n"])), key_step=step))
    said = draw(st.lists(st.sampled_from(["x", "y", ""]), max_size=2))
    end = StepEnd(step=step, unix_time=float(step), dropped={"tokens": draw(st.integers(0, 1))}, epoch=step // 4)
    return AssembledStep(
        run_id="run",
        attempt=attempt,
        step=step,
        reason="complete",
        parts={Kind(m.kind): (Part(rank=0, message=m),) for m in sent},
        ends={0: end} if draw(st.booleans()) else {},
        notices=tuple(Notice(text="said", code=code) for code in said),
        unix_time=float(step),
    )


@st.composite
def runs(draw: st.DrawFn) -> list[AssembledStep]:
    """An attempt of up to 10 steps, and another one that goes on from one of them."""
    first = [draw(messages(step, 0)) for step in range(draw(st.integers(1, 10)))]
    start = draw(st.integers(0, len(first)))
    return first + [draw(messages(step, 1)) for step in range(start, start + draw(st.integers(0, 5)))]


def outputs(steps: Sequence[AssembledStep], *, restart_at_every_step: bool) -> tuple[list[bytes], bytes]:
    projection = RunProjection(context(0))
    payloads: list[bytes] = []
    stored: dict[str, bytes] = {}
    for step in steps:
        if restart_at_every_step:
            saved = projection.state()
            stored.update(projection.changed_pieces())  # all that is written at a step
            projection = RunProjection(context(step.attempt))
            projection.restore_pieces(stored)
            assert projection.state() == saved
            assert projection.changed_pieces() == {}
        elif step.attempt:
            projection.adopt(context(step.attempt))
        made = projection.project(step)
        payloads += [entry.kind.encode() + entry.payload for entry in made.entries]
        payloads += [notice.text.encode() for notice in made.notices]
    payloads += [entry.payload for entry in projection.finish(0, "done").entries]
    return payloads, projection.state()


@UNHURRIED
@given(steps=runs())
def test_restoring_changes_no_byte(steps: list[AssembledStep]) -> None:
    straight = outputs(steps, restart_at_every_step=False)
    assert outputs(steps, restart_at_every_step=False) == straight, "the same steps give the same bytes"
    assert outputs(steps, restart_at_every_step=True) == straight
