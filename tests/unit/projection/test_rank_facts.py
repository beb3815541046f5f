"""Which rank stands out, whose norms belong together, and what is said of ranks that are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sidestep.protocol.messages import Kind, Signals, StepEnd
from sidestep.worker.copy_norms import norms_by_copy, whole_norms
from sidestep.worker.rank_facts import missing_ranks, rank_facts
from sidestep.worker.record_building import build_record
from sidestep.worker.records import AssembledStep, Part, RunContext


class NoText:
    def token(self, token_id: int) -> str:
        raise AssertionError(token_id)

    def text(self, ids: Sequence[int]) -> str:
        raise AssertionError(ids)


def context(*topologies: dict[str, Any]) -> RunContext:
    return RunContext(run_id="r", attempt=0, text=NoText(), topologies=dict(enumerate(topologies)))


def of_data(rank: int, copy: int | None = None) -> dict[str, Any]:
    return {"data_parallel_rank": rank, "copy": rank if copy is None else copy}


def signals(loss: float = 1.0, **fields: Any) -> Signals:
    told = {"forward_seconds": 0.1, "labelled": 2, "targets": np.zeros(2, np.int32), "places": np.zeros(2, np.uint8)}
    losses = np.full(2, loss, np.float16)
    return Signals(step=4, counts=np.zeros(11, np.int64), losses=losses, **{**told, **fields})


def step(*sent: Signals, **fields: Any) -> AssembledStep:
    parts = {Kind.SIGNALS: tuple(Part(rank=rank, message=message) for rank, message in enumerate(sent))}
    told = {"ranks_expected": len(sent), "ranks_seen": len(sent), "reason": "complete", **fields}
    return AssembledStep(run_id="r", attempt=0, step=4, parts=parts, **told)


def single(value: float) -> Any:
    return np.array([value], np.float32)


def test_the_rank_with_the_highest_loss_and_the_slowest_one_are_named() -> None:
    sent = [signals(1.0), signals(1.5, forward_seconds=0.9), signals(4.0), signals(0.5)]
    facts = rank_facts(step(*sent), context(*(of_data(rank) for rank in range(4))))
    assert (facts["sidecar/ranks/loss"], facts["sidecar/ranks/loss_rank"]) == (4.0, 2)
    assert facts["sidecar/ranks/loss_gap"] == 2.75
    assert facts["sidecar/ranks/forward_seconds_rank"] == 1
    assert facts["sidecar/ranks/forward_seconds_gap"] == pytest.approx(0.8)
    assert "sidecar/ranks/gradient_norm" not in facts


def test_copies_of_a_batch_are_one_rank_and_older_trainers_say_nothing() -> None:
    sent = [signals(1.0), signals(3.0)]
    copies = rank_facts(step(*sent), context(of_data(0, 0), of_data(0, 0)))
    assert "sidecar/ranks/loss" not in copies
    assert rank_facts(step(*sent), context({}, {})) == {}
    assert rank_facts(step(sent[0]), context(of_data(0))) == {}


def test_norms_of_shares_add_up_within_a_copy_and_copies_are_compared() -> None:
    norms = ([3.0, -1.0], [4.0, -1.0], [3.0, -1.0], [12.0, -1.0])
    sent = [signals(module_norms=np.array(each, np.float32), norm_shares=2) for each in norms]
    known = context(*(of_data(rank, rank // 2) for rank in range(4)))
    pairs = list(enumerate(sent))
    assert {rank: found.tolist() for rank, (found, _) in norms_by_copy(pairs, known).items()} == {
        0: [5.0, -1.0], 2: [math.sqrt(153.0), -1.0],
    }  # fmt: skip
    facts = rank_facts(step(*sent), known)
    assert facts["sidecar/ranks/gradient_norm_gap"] == pytest.approx((math.sqrt(153) - 5) / 2)
    assert facts["sidecar/ranks/gradient_norm_rank"] == 2
    assert whole_norms(pairs[1:], known) == {2: pytest.approx(math.sqrt(153))}, "a copy without a share has no norm"
    record = build_record(step(*sent[:2]), known)
    assert record.gradient_norm == pytest.approx(5.0)
    assert record.module_norms.tolist() == [5.0, -1.0]


def test_a_norm_that_was_told_stands_before_the_shares_and_clipped_ones_are_none() -> None:
    shares = {"module_norms": single(3.0), "norm_shares": 2}
    told = [signals(gradient_norm=single(7.0), **shares) for _ in range(2)]
    known = context(of_data(0, 0), of_data(1, 0))
    assert set(whole_norms(list(enumerate(told)), known).values()) == {7.0}
    clipped = [signals(norms_clipped=True, **shares) for _ in range(2)]
    assert whole_norms(list(enumerate(clipped)), known) == {}
    assert build_record(step(*clipped), known).gradient_norm is None


def test_a_step_without_all_its_ranks_says_which_of_how_many() -> None:
    ends = {0: StepEnd(step=4, unix_time=1.0), 2: StepEnd(step=4, unix_time=1.0)}
    late = step(signals(), ends=ends, ranks_expected=4, ranks_seen=2, reason="deadline")
    notice = missing_ranks(late, context(of_data(0), of_data(1)))
    assert notice is not None
    assert notice.text.startswith("step 4 is shown with 2 of 4 ranks: rank 1, 3 had not ended it in time")
    assert rank_facts(late, context(of_data(0), of_data(1)))["sidecar/ranks_expected"] == 4
    assert missing_ranks(late, context({}, {})) is None, "an older trainer's journal replays to what it was"
    assert missing_ranks(step(signals(), ends=ends), context(of_data(0))) is None
