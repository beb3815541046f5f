"""What a publisher shows people, whatever their console does, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from tests.support.publisher_trainer import IDENTITY, Trainer, end, losses

from sidestep.protocol.errors import EncodeError, EndpointError
from sidestep.protocol.messages import (
    Command,
    Goodbye,
    Hello,
    Kind,
    Message,
    Notice,
)
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.publisher import Publisher

if TYPE_CHECKING:
    from tests.integration.publisher.conftest import RouterWorker

MakeWorker: TypeAlias = "Callable[..., RouterWorker]"
Eventually: TypeAlias = Callable[[Callable[[], object]], None]


def test_reject_makes_it_idle_and_says_so_once(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    worker = make_worker()
    worker.reject_reason = "this worker speaks wire 9.0."
    worker.start()
    trainer = make_trainer()
    trainer.publisher.submit(losses(1))
    eventually(lambda: trainer.publisher.statistics().rejected)
    trainer.publisher.submit(losses(2))
    eventually(lambda: trainer.publisher.accounts()[Kind.LOSSES].dropped == 2)
    trainer.publisher.close(5)
    assert [line for line in trainer.lines if "wire 9.0" in line] == trainer.lines
    assert len(trainer.lines) == 1


def test_notices_are_shown_and_commands_wait_for_the_trainer(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    worker = make_worker().start()
    trainer = make_trainer()
    eventually(lambda: worker.hellos)
    warning = "⚠️ MODEL COLLAPSE DETECTED: single_token_dominance"
    worker.say(Notice(text=warning))
    worker.say(Command(action="stop", command_id="c1"))
    eventually(lambda: trainer.lines)
    assert trainer.lines == [f"\n{warning}\n"]
    eventually(lambda: trainer.publisher._commands)
    command = trainer.publisher.take_command()
    assert command is not None
    assert command.action == "stop"
    assert trainer.publisher.take_command() is None


def test_a_dead_console_does_not_matter(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    def dead(_text: str) -> None:
        raise BrokenPipeError

    worker = make_worker().start()
    console = Console(dead)
    trainer = make_trainer(console=console)
    eventually(lambda: worker.hellos)
    worker.say(Notice(text="hello"))
    eventually(lambda: console.num_lines_lost == 1)
    trainer.publisher.submit(losses(1))
    eventually(lambda: trainer.accepted() == 1)


def test_a_console_that_blocks_stops_neither_submit_nor_close(address: str, make_worker: MakeWorker) -> None:
    released = threading.Event()
    entered = threading.Event()

    def stuck(_text: str) -> None:
        entered.set()
        released.wait(30)

    worker = make_worker().start()
    trainer = Trainer(address, console=Console(stuck))
    while not entered.is_set():
        worker.say(Notice(text="hello"))
        time.sleep(0.01)
    for step in range(1_000):
        trainer.publisher.submit(losses(step))
    began = time.monotonic()
    trainer.publisher.close(0.2)
    assert time.monotonic() - began < 10, "close gives up on a thread that hangs in the user's terminal"
    released.set()
    trainer.wait_for_the_end()
    trainer.assert_exact()


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_close_says_goodbye_last_and_leaves_nothing_behind(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker
) -> None:
    worker = make_worker().start()
    before = num_open_files()
    trainer = make_trainer()
    for step in range(30):
        trainer.publisher.submit(losses(step))
        trainer.publisher.submit(end(step, losses=1))
    trainer.publisher.close(10, exit_code=1, reason="it failed")
    last = worker.stored[max(worker.stored)]
    assert isinstance(last, Goodbye)
    assert (last.newest_step, last.exit_code, last.reason) == (29, 1, "it failed")
    assert trainer.accepted() == 61
    assert trainer.lines == []
    trainer.publisher.submit(losses(99))
    assert trainer.publisher.accounts()[Kind.LOSSES].dropped == 1
    trainer.assert_exact()
    deadline = time.monotonic() + 10
    while num_open_files() > before + 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # the worker's own end of the connection closes a moment later
    assert num_open_files() <= before + 1


@pytest.mark.parametrize("silent_for_long", [False, True])
def test_close_is_bounded_without_a_worker_and_says_what_is_lost(
    make_trainer: Callable[..., Trainer], silent_for_long: bool
) -> None:
    trainer = make_trainer()
    for step in range(7):
        trainer.publisher.submit(losses(step))
    trainer.publisher._conversation._started_at -= 11 if silent_for_long else 0
    began = time.monotonic()
    trainer.publisher.close(60 if silent_for_long else 0.3)
    assert time.monotonic() - began < 20
    trainer.wait_for_the_end()
    accounts = trainer.publisher.accounts()
    assert accounts[Kind.LOSSES].dropped == 7
    assert accounts[Kind.GOODBYE].dropped == 1
    assert [line for line in trainer.lines if "8 messages had not reached the worker" in line] == trainer.lines[-1:]
    num_lines = len(trainer.lines)
    trainer.publisher.close(60)
    assert len(trainer.lines) == num_lines


def test_a_publisher_that_never_started_closes_too(address: str) -> None:
    lines: list[str] = []
    publisher = Publisher(address, IDENTITY, Hello(), console=Console(lines.append))
    publisher.submit(losses(1))
    publisher.close()
    assert publisher.accounts()[Kind.LOSSES].dropped == 1
    assert len(lines) == 1


class Fallible:
    """A source whose first poll raises."""

    def __init__(self) -> None:
        self.num_polls = 0
        self.num_pending = 0

    def advance(self) -> None:
        """Nothing to look for."""

    def poll(self) -> list[Message]:
        self.num_polls += 1
        if self.num_polls == 1:
            raise RuntimeError("a mistake of ours")
        return []

    def take_skips(self) -> list[Any]:
        return []


def test_an_error_in_a_tick_is_said_once_and_the_thread_goes_on(
    make_trainer: Callable[..., Trainer], make_worker: MakeWorker, eventually: Eventually
) -> None:
    make_worker().start()
    trainer = make_trainer(source=Fallible())
    trainer.publisher.submit(losses(1))
    eventually(lambda: trainer.accepted() == 1)
    assert trainer.publisher.statistics().num_errors == 1
    assert trainer.lines == ["sidestep: the publisher met an error and goes on: RuntimeError('a mistake of ours')\n"]


def test_mistakes_in_the_configuration_raise_before_anything_starts(address: str) -> None:
    with pytest.raises(EndpointError, match="neither"):
        Publisher("udp://x:1", IDENTITY, Hello())
    with pytest.raises(EncodeError):
        Publisher(address, IDENTITY, Hello(run_config={"model": object()}))
