"""A command is taken by all ranks at one step or by none: real processes, a real store, ranks out of step."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import deque
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
from torch import distributed

from sidestep.protocol.messages import Command
from sidestep.trainer_hooks.boundary import StoreAgreement
from sidestep.trainer_hooks.control import Control

RANKS = 4
TRIALS = 60
STEPS_BETWEEN = 30
STEP_SECONDS = 0.005
STEPS_APART = 5
PATIENCE_SECONDS = 170.0


def client(port: int) -> Any:
    """The store as a rank's control thread opens it."""
    torch_distributed: Any = distributed  # whose stores are not typed as its own
    return torch_distributed.PrefixStore(
        "c", torch_distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    )


def rank(number: int, port: int, together: Barrier, pipe: Connection) -> None:
    """Train fast and unevenly; hear of each command at another time than the other ranks, or too late."""
    draw = random.Random(number)
    waiting: deque[Command] = deque()
    agreement = StoreAgreement(
        lambda: client(port),
        world_size=RANKS,
        incarnation="i",
    )
    control = Control(lambda: waiting.popleft() if waiting else None, agreement)
    taken: list[tuple[str, int]] = []
    commands = [Command(action="stop", command_id=str(n), at_step=(n + 1) * STEPS_BETWEEN) for n in range(TRIALS)]
    # Most hear of it well ahead, some just before or after the step: those are the trials that must abort everywhere.
    heard = {
        each.at_step - draw.choice((25, 20, 15, 3, 1, 0, -1) if draw.random() < 0.15 else (25, 20)): each
        for each in commands
    }
    for step in range((TRIALS + 1) * STEPS_BETWEEN):
        if step in heard:
            waiting.append(heard[step])
        if step % STEPS_APART == 0:
            together.wait(PATIENCE_SECONDS)  # as all-reduces keep them in step, give or take some
        time.sleep(draw.random() * 2 * STEP_SECONDS)
        command = control.at_boundary(step)
        if command is not None:
            taken.append((command.command_id, step))
    pipe.send((taken, len(control.over), agreement.errors))


@pytest.mark.timeout(240)
def test_all_ranks_take_a_command_at_one_step_or_none_does() -> None:
    torch_distributed: Any = distributed
    store = torch_distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(RANKS)
    pipes, processes = [], []
    for number in range(RANKS):
        mine, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=rank, args=(number, store.port, together, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    results = []
    for pipe in pipes:
        assert pipe.poll(PATIENCE_SECONDS)
        results.append(pipe.recv())
    for process in processes:
        process.join(10)
    taken = [each[0] for each in results]
    assert all(each == taken[0] for each in taken), "a command was taken by some ranks and not by others"
    assert all(step == (int(command) + 1) * STEPS_BETWEEN for command, step in taken[0])
    assert TRIALS / 4 < len(taken[0]) < TRIALS, "some trials must succeed and some abort"
    assert all(over == TRIALS - len(taken[0]) for _, over, _ in results)
    assert all(errors == 0 for *_, errors in results)


def test_a_store_that_fails_lets_the_training_go_on() -> None:
    def refused() -> object:
        raise RuntimeError("no store")

    agreement = StoreAgreement(refused, world_size=2, incarnation="i")
    waiting = deque([Command(action="stop", command_id="1", at_step=3)])
    control = Control(lambda: waiting.popleft() if waiting else None, agreement)
    assert [control.at_boundary(step) for step in range(2)] == [None, None]
    deadline = time.monotonic() + 30
    while not agreement.errors and time.monotonic() < deadline:
        time.sleep(0.01)
    assert agreement.errors == 1
    assert [control.at_boundary(step) for step in range(2, 6)] == [None] * 4
    assert [command.command_id for command in control.over] == ["1"]
