"""What is told of the ranks that are heard: counters that only grow, and no more ranks by name than a page can hold."""

from __future__ import annotations

import pytest

from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Message, Notice, StepEnd
from sidestep.worker.heard import MAX_SHOWN_RANKS, HeardRuns
from sidestep.worker.intake.assembly import Journaled


def said(
    sequence: int, message: Message, *, rank: int = 0, incarnation: str = "one", dropped: int = 0, resent: int = 0
) -> Journaled:
    envelope = Envelope(
        run_id="run", incarnation=incarnation, rank=rank, sequence=sequence, resent=resent,
        accounts={"losses": (sequence, dropped, 0)},
    )  # fmt: skip
    return Journaled(envelope=envelope, message=message)


def end(step: int) -> StepEnd:
    return StepEnd(step=step, unix_time=0.0)


def test_the_newest_word_of_each_rank_counts_in_whatever_order_it_comes() -> None:
    heard = HeardRuns()
    heard.take(said(9, end(4), dropped=2))
    heard.take(said(5, end(2), dropped=1))
    heard.take(said(3, end(3), rank=1, resent=2))
    report = heard.report("run")
    assert report["messages"] == {"losses": {"produced": 12, "dropped": 2, "refused": 0}}
    assert (report["resent"], report["ranks_heard"]) == (2, 2)
    assert (report["slowest_step"], report["newest_step"], report["last_steps"]) == (3, 4, {"0": 4, "1": 3})


def test_a_trainer_that_starts_again_lets_no_counter_fall() -> None:
    heard = HeardRuns()
    heard.take(said(9, end(4), dropped=2, resent=3))
    heard.take(said(1, Notice(text="hello"), incarnation="two"))
    heard.take(said(10, end(5), dropped=7))  # of the one that is gone: too late to be of interest
    report = heard.report("run")
    assert report["messages"]["losses"] == {"produced": 10, "dropped": 2, "refused": 0}
    assert (report["resent"], report["newest_step"], report["ranks_heard"]) == (3, -1, 1)


@pytest.mark.parametrize("num_ranks", [MAX_SHOWN_RANKS, MAX_SHOWN_RANKS + 1])
def test_of_many_ranks_the_first_and_the_last_are_told(num_ranks: int) -> None:
    heard = HeardRuns()
    for rank in range(num_ranks):
        heard.take(said(1, end(100 + rank), rank=rank))
    report = heard.report("run")
    assert len(report["last_steps"]) == (num_ranks if num_ranks <= MAX_SHOWN_RANKS else 0)
    assert (report["slowest_step"], report["newest_step"]) == (100, 99 + num_ranks)
    assert report["ranks_heard"] == num_ranks


def test_a_run_that_nobody_spoke_of_has_all_keys_too() -> None:
    heard = HeardRuns()
    heard.take(said(1, end(0)))
    assert heard.report("other").keys() == heard.report("run").keys()
