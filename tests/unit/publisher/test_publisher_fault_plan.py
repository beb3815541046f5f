"""The plan of faults: what strikes whom, how often, and that it survives a process' environment."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sidestep.protocol.faults import FAULTS_VARIABLE, Action, Fault, Faults, InjectedFaultError, recorded_counts
from sidestep.protocol.messages import Kind, LearningRates
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.faults import FINISH, POINTS, SEND, STAGE, TICK
from sidestep.trainer_hooks.faulty_staging import make_staging


def test_a_fault_strikes_at_its_rank_and_step_so_often_and_is_counted() -> None:
    faults = Faults().fail_at(TICK, rank=1, step=5, times=2).drop_at(SEND, kind="losses", times=0)
    assert faults.strike(TICK, rank=0, step=9) is None
    assert faults.strike(TICK, rank=1, step=4) is None
    assert [faults.strike(TICK, rank=1, step=step) is not None for step in (5, 7, 9)] == [True, True, False]
    assert [faults.strike(SEND, kind=kind) is not None for kind in ("losses", "tokens", "losses")] == [
        True,
        False,
        True,
    ]
    assert faults.counts() == {"fail trainer.tick": 2, "drop trainer.send": 2}


def test_what_acts_raises_waits_or_says_that_it_drops() -> None:
    faults = Faults().fail_at(TICK).stall_at(TICK, seconds=0.001).drop_at(TICK)
    with pytest.raises(InjectedFaultError, match=r"trainer\.tick"):
        faults.act(TICK)
    assert [faults.act(TICK) for _ in range(3)] == [False, True, False]


def test_a_plan_travels_as_text_and_its_strikes_outlive_a_process(tmp_path: Path) -> None:
    record = tmp_path / "struck"
    plan = Faults(record=record).stall_at(TICK, seconds=2.5, rank=3).fail_at("worker.commit", step=7, times=0)
    assert recorded_counts(record) == {}
    read = Faults.from_environment({FAULTS_VARIABLE: plan.to_json()})
    assert read is not None
    assert read.to_json() == plan.to_json()
    for step in (6, 7, 8):
        read.strike("worker.commit", step=step)
    assert recorded_counts(record) == {"fail worker.commit": 2}
    assert Faults.from_environment({}) is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "nonsense",
        '{"faults": [1]}',
        '{"faults": [{"action": "fail"}]}',
        '{"faults": [{"action": "explode", "where": "trainer.tick"}]}',
        '{"faults": [{"action": "fail", "where": "trainer.tick", "when": 1}]}',
    ],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Faults.from_json(text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"where": "tick"}, "where"),
        ({"rank": -1}, "rank"),
        ({"step": 1.5}, "step"),
        ({"times": True}, "times"),
        ({"action": Action.STALL}, "seconds"),
        ({"seconds": 1.0}, "seconds"),
        ({"action": Action.DELAY, "seconds": float("inf")}, "seconds"),
    ],
)
def test_a_fault_that_makes_no_sense_names_its_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"Fault\.{named}"):
        Fault(**{"action": Action.FAIL, "where": TICK, **changes})


def test_a_point_that_there_is_not_is_refused_where_it_would_be() -> None:
    faults = Faults().fail_at("trainer.tock").fail_at("worker.whatever")
    with pytest.raises(ValueError, match=r"trainer\.tock; there are .*trainer\.tick"):
        faults.check_points("trainer", POINTS)


def test_many_threads_share_the_strikes_among_them() -> None:
    faults = Faults().drop_at(SEND, times=100)
    struck: list[int] = []

    def ask() -> None:
        struck.append(sum(faults.strike(SEND) is not None for _ in range(80)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(struck) == faults.counts()["drop trainer.send"] == 100


def rates(arrays: dict[str, Any]) -> list[LearningRates]:
    return [LearningRates(step=1, rates=arrays["rates"].astype(np.float64))]


def test_copies_fail_find_no_room_or_are_done_late() -> None:
    faults = Faults().fail_at(STAGE, step=1).drop_at(STAGE, step=2).delay_at(STAGE, step=3, seconds=0.05)
    faults.fail_at(FINISH, step=4).drop_at(FINISH, step=5)
    lines: list[str] = []
    staging = make_staging(faults, rank=0, max_host_bytes=1 << 20, console=Console(lines.append))

    def stage(step: int) -> bool:
        tensors = {"rates": torch.ones(2)}
        return staging.stage(tensors, rates, kinds=(Kind.LEARNING_RATES,), step=step)

    with pytest.raises(InjectedFaultError):
        stage(1)
    assert not stage(2)
    assert stage(3)
    staging.advance()
    assert staging.poll() == [], "it is delayed"
    while staging.num_pending:
        staging.advance()
        made = staging.poll()
    assert [message.kind for message in made] == [Kind.LEARNING_RATES]
    assert stage(4)
    assert stage(5)
    assert staging.poll() == []
    assert [(skip.step, skip.announced) for skip in staging.take_skips()] == [(2, False), (4, True), (5, True)]
    assert len(lines) == 1
    assert staging.statistics().num_finish_errors == 1
    assert sum(faults.counts().values()) == 5
