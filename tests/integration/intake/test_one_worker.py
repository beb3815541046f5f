"""One worker an endpoint: a second one hands its owner over, and the first stays for both."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.support.worker_process import WorkerProcess, wait_until


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def owner(stack: ExitStack) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stack.callback(process.communicate)
    stack.callback(process.kill)
    return process


def test_a_second_worker_hands_its_owner_over_and_the_first_ends_when_both_are_gone(stack: ExitStack) -> None:
    first, second = owner(stack), owner(stack)
    worker = WorkerProcess("--owner-pid", str(first.pid), "--idle-exit-seconds", "1")
    stack.callback(worker.remove)
    worker.start()
    assert worker.process is not None
    another = worker.run("worker", "--endpoint", worker.address, "--owner-pid", str(second.pid))
    assert another.returncode == 0, another.stderr
    assert f"serves already, and stays for process {second.pid}" in another.stdout
    first.kill()
    first.wait()
    time.sleep(3.0)
    assert worker.process.poll() is None, "the second owner lives"
    second.kill()
    second.wait()
    wait_until(lambda: worker.process is not None and worker.process.poll() is not None, "the worker ends")
    assert worker.process.returncode == 0


def test_without_an_owner_a_second_worker_says_that_the_endpoint_is_served(stack: ExitStack) -> None:
    worker = WorkerProcess()
    stack.callback(worker.remove)
    worker.start()
    another = worker.run("worker", "--endpoint", worker.address)
    assert another.returncode == 1
    assert "another worker serves" in another.stderr


def test_who_comes_while_the_worker_ends_takes_its_place(stack: ExitStack) -> None:
    """The ending one is still at work on its last turns: the next one waits for the endpoint, and then serves it."""
    first, second = owner(stack), owner(stack)
    worker = WorkerProcess("--owner-pid", str(first.pid), "--idle-exit-seconds", "0")
    stack.callback(worker.remove)
    worker.start()
    assert worker.process is not None
    ending = worker.process
    ending.terminate()
    command = worker.command(
        "worker", "--endpoint", worker.address, "--owner-pid", str(second.pid), "--wandb-mode=disabled"
    )
    next_one = subprocess.Popen(command, env=worker.environment, stdout=subprocess.PIPE, text=True)
    stack.callback(next_one.communicate)
    stack.callback(next_one.kill)
    assert next_one.stdout is not None
    said = next_one.stdout.readline()
    assert said.startswith("sidestep: listening at"), said
    assert ending.wait(30) == 0
