"""A message that waits is the same message, in one piece of memory of its own."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from sidestep.protocol import frames
from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Gradients, Losses, StepEnd
from sidestep.trainer_hooks.compaction import compacted
from sidestep.trainer_hooks.delivery import Delivery

IDENTITY = Envelope(run_id="run", incarnation="one", rank=0, sequence=1)


def gradients(step: int = 3) -> Gradients:
    rng = np.random.default_rng(step)
    counts = rng.integers(0, 99, 5)
    return Gradients(
        step=step,
        parameters=np.arange(10, dtype=np.int32)[::2],  # not contiguous
        counts=counts,
        nonfinite=counts[::-1],
        zeros=counts,
        exponents=np.arange(5, dtype=np.int32),
        means=rng.random(5),
        m2=rng.random(5),
        absmax=rng.random(5),
        histograms=rng.integers(0, 9, (3, 7)).T,
    )


def test_it_is_the_same_message_bit_for_bit_and_nothing_of_the_old_arrays_is_kept() -> None:
    message = gradients()
    moved = compacted(message)
    assert frames.encode(IDENTITY, moved) == frames.encode(IDENTITY, message)
    arrays = {f.name: getattr(moved, f.name) for f in fields(moved) if isinstance(getattr(moved, f.name), np.ndarray)}
    assert len({id(array.base) for array in arrays.values()}) == 1, "one allocation"
    for name, array in arrays.items():
        assert not np.shares_memory(array, getattr(message, name))


def test_one_without_arrays_stays_itself() -> None:
    end = StepEnd(step=1, unix_time=0.0)
    assert compacted(end) is end


def test_what_waits_behind_a_tick_is_moved_and_leaves_unchanged() -> None:
    delivery = Delivery(Envelope(run_id="run", incarnation="one", rank=0))
    rows = [np.full(7, step, np.float32) for step in range(12)]
    for step, losses in enumerate(rows):
        delivery.take(Losses(step=step, microstep=0, labelled=7, losses=losses))
    for losses in rows:
        np.add(losses, 100.0, out=losses)  # what was moved does not see it
    seen = []
    while (frame := delivery.next_frame()) is not None:
        message = frames.decode(frame)[1]
        assert isinstance(message, Losses)
        seen.append(float(message.losses[0]) - message.step)
        delivery.frame_sent()
    assert seen == [100.0] * 8 + [0.0] * 4
