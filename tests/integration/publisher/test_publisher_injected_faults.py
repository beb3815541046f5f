"""The publisher under injected faults: each strikes, is counted, and costs no more than it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pytest

from sidestep.protocol.faults import Faults
from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Hello, Kind, Losses, StepEnd
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.conversation import Patience
from sidestep.trainer_hooks.faults import HANDSHAKE, RECEIVE, SEND, TAKE, TICK
from sidestep.trainer_hooks.publisher import Publisher

if TYPE_CHECKING:
    from tests.integration.publisher.conftest import RouterWorker

Eventually: TypeAlias = Callable[[Callable[[], object]], None]
NUM_STEPS = 30


class Scene:
    """A worker, and a publisher with faults that hands over thirty steps."""

    def __init__(self, worker: RouterWorker, address: str, eventually: Eventually) -> None:
        self.worker = worker.start()
        self.lines: list[str] = []
        self._address = address
        self._eventually = eventually
        self.publisher: Publisher | None = None

    def run(self, faults: Faults) -> Publisher:
        """Return the publisher once all that it handed over is settled."""
        self.publisher = publisher = Publisher(
            self._address,
            Envelope(run_id="run", incarnation="one", rank=3),
            Hello(),
            console=Console(self.lines.append),
            patience=Patience(progress_seconds=0.3),
            faults=faults,
        )
        publisher.start()
        for step in range(NUM_STEPS):
            publisher.submit(Losses(step=step, microstep=0, labelled=4, losses=np.ones(4, np.float32)))
            publisher.submit(StepEnd(step=step, unix_time=0.0, sent={"losses": 1}))
        self._eventually(self._is_settled)
        for account in publisher.accounts().values():
            assert account.produced == account.accepted + account.refused + account.dropped + account.in_window
        return publisher

    def _is_settled(self) -> bool:
        assert self.publisher is not None
        accounts = self.publisher.accounts()
        all_known = all(k in accounts and accounts[k].produced >= NUM_STEPS for k in (Kind.LOSSES, Kind.STEP_END))
        return all_known and not any(account.in_window for account in accounts.values())

    def stored_steps(self) -> list[int]:
        return [m.step for _, m in sorted(self.worker.stored.items()) if isinstance(m, Losses)]


@pytest.fixture
def scene(address: str, make_worker: Callable[..., RouterWorker], eventually: Eventually) -> Iterator[Scene]:
    made = Scene(make_worker(), address, eventually)
    yield made
    if made.publisher is not None:
        made.publisher.close(0.5)


@pytest.mark.parametrize(
    "faults",
    [
        Faults().drop_at(SEND, kind="losses", step=0, times=3),
        Faults().fail_at(SEND, kind="step_end", times=2),
        Faults().stall_at(SEND, seconds=0.2, step=0),
        Faults().delay_at(SEND, seconds=0.1, kind="losses", times=2),
        Faults().drop_at(RECEIVE, kind="ack", times=4),
        Faults().drop_at(RECEIVE, kind="welcome"),
        Faults().stall_at(RECEIVE, seconds=0.2),
        Faults().delay_at(RECEIVE, seconds=0.1, kind="ack"),
        Faults().fail_at(TICK, rank=3, times=3),
        Faults().stall_at(TICK, seconds=0.2),
        Faults().delay_at(TAKE, seconds=0.1, kind="losses", step=5, times=2),
        Faults().fail_at(HANDSHAKE),
    ],
    ids=lambda faults: next(iter(faults._plan)).action + " " + next(iter(faults._plan)).where,
)
def test_what_the_link_and_the_thread_suffer_loses_nothing(scene: Scene, faults: Faults) -> None:
    publisher = scene.run(faults)
    assert sorted(scene.stored_steps()) == list(range(NUM_STEPS))
    assert sum(faults.counts().values()) >= 1
    raised = [name for name in ("fail trainer.send", "fail trainer.tick") if name in faults.counts()]
    assert publisher.statistics().num_errors == sum(faults.counts()[name] for name in raised)


def test_a_message_dropped_on_its_way_in_is_counted_and_its_step_says_so(scene: Scene) -> None:
    faults = Faults().drop_at(TAKE, rank=3, step=7, kind="losses").drop_at(TAKE, rank=2, step=9, times=0)
    publisher = scene.run(faults)
    assert faults.counts() == {"drop trainer.take": 1}
    assert scene.stored_steps() == [step for step in range(NUM_STEPS) if step != 7]
    assert publisher.accounts()[Kind.LOSSES].dropped == 1
    ends = {m.step: m for _, m in sorted(scene.worker.stored.items()) if isinstance(m, StepEnd)}
    assert (ends[7].sent, ends[7].dropped) == ({"losses": 0}, {"losses": 1})


def test_a_plan_with_an_unknown_point_is_a_mistake_before_anything_starts(address: str) -> None:
    with pytest.raises(ValueError, match="no such point"):
        Publisher(address, Envelope(run_id="r", incarnation="i", rank=0), Hello(), faults=Faults().fail_at("trainer.x"))
