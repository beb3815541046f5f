"""Several ways to train the same, in turns: each in a process of its own, a few optimizer steps at a time.

So all of them see the same machine at the same time, and none sees another. ``Turns`` runs in each trainer's process,
``take_turns`` in the one that started them, beside ``worker_beside``.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sidestep.protocol import frames
from sidestep.protocol.messages import Hello, Kind, StepEnd

TURN_STEPS = 5
_STARTING_SECONDS = 30.0
CLOCKS = ("wall", "thread_cpu", "process_cpu")

Step = dict[str, Any]
"""A step's number, its seconds by each of ``CLOCKS``, and the calls that ``TimedCalls`` kept."""


class TimedCalls:
    """Passes calls on and keeps the thread's CPU and the wall time of each."""

    def __init__(self, hooks: Any) -> None:
        self._hooks = hooks
        self.calls: list[tuple[str, float, float]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        inner = getattr(self._hooks, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return inner(*arguments, **named)
            finally:
                self.calls.append((name, time.thread_time() - cpu, time.perf_counter() - wall))

        return timed


class Turns:
    """Keeps what each step of a trainer costs, and stops it every few steps until it is its turn again."""

    def __init__(self, pipe: Any, timed: TimedCalls, *, settle_seconds: float = 0.0) -> None:
        """Wait for the first turn.

        Args:
            pipe: the end of it that ``take_turns`` gave.
            timed: whose calls are kept with the steps.
            settle_seconds: how long other threads may finish what the turn's steps left them; their CPU is the
                steps' own, an equal share for each.
        """
        self._pipe, self._timed, self._settle_seconds = pipe, timed, settle_seconds
        self._steps: list[Step] = []
        self._pipe.recv()
        self._stamp()

    def _stamp(self) -> None:
        self._at = (time.perf_counter(), time.thread_time(), time.process_time())

    def end_step(self, step: int) -> None:
        """Keep what the step cost; hand over at the end of a turn."""
        now = (time.perf_counter(), time.thread_time(), time.process_time())
        costs = dict(zip(CLOCKS, (b - a for a, b in zip(self._at, now, strict=True)), strict=True))
        self._steps.append({"step": step, **costs, "calls": list(self._timed.calls)})
        self._timed.calls.clear()
        if len(self._steps) == TURN_STEPS:
            self._settle()
            self._pipe.send(self._steps)
            self._steps = []
            self._pipe.recv()
        self._stamp()

    def _settle(self) -> None:
        if self._settle_seconds:
            before = time.process_time()
            time.sleep(self._settle_seconds)
            for step in self._steps:
                step["process_cpu"] += (time.process_time() - before) / TURN_STEPS


@contextmanager
def worker_beside(folder: Path, *, core: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A real worker beside the trainers, for as long as the block lasts; on one ``core`` if that is given.

    Raises:
        RuntimeError: it ended before the block did, or does not listen; the text is the end of its log.
    """
    environment = {**os.environ, "SIDESTEP_HOME": str(folder / "home"), "WANDB_MODE": "offline"}
    endpoint = f"ipc://{folder}/w.sock"
    options = ["--endpoint", endpoint, "--out", str(folder / "out")]
    command = [sys.executable, "-m", "sidestep.worker.cli", "worker", *options]
    folder.chmod(0o700)
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    os.environ["SIDESTEP_ENDPOINT"] = endpoint
    try:
        until = time.monotonic() + _STARTING_SECONDS
        while not (folder / "w.sock").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        _check_runs(process, folder)
        yield process
        _check_runs(process, folder)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _check_runs(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.poll() is not None or not (folder / "w.sock").exists():
        log = (folder / "worker.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"there is no worker to measure with:\n{log[-2000:]}")


def take_turns(
    modes: Sequence[str], train: Callable[..., None], arguments: tuple[Any, ...], num_steps: int
) -> tuple[dict[str, list[Step]], dict[str, Any]]:
    """Run ``train(mode, *arguments, pipe)`` for each mode, turn by turn.

    It sends ``"ready"``, makes its ``Turns``, trains one step more than ``num_steps``, and sends what it has to say.

    Returns:
        Each mode's steps, and what each sent at the end.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for mode in modes:
        pipes[mode], theirs = context.Pipe()
        processes[mode] = context.Process(target=train, args=(mode, *arguments, theirs))
        processes[mode].start()
        theirs.close()  # so that a process that dies is an EOFError here, and not waited for
    for pipe in pipes.values():
        pipe.recv()
    steps: dict[str, list[Step]] = {mode: [] for mode in modes}
    for turn in range(num_steps // TURN_STEPS):
        place = turn % len(modes)
        for mode in (*modes[place:], *modes[:place]):  # nobody always comes after the same one
            pipes[mode].send("go")
            steps[mode] += pipes[mode].recv()
    for pipe in pipes.values():
        pipe.send("go")
    said = {mode: pipes[mode].recv() for mode in modes}
    for process in processes.values():
        process.join(timeout=60)
    return steps, said


def hook_milliseconds(journal: Path, *, first: int) -> dict[str, list[float]]:
    """Return what the hooks themselves counted per step, by the name of the run: calls and hooks on the model alike.

    The worker has it in its journal; the steps from ``first`` on.
    """
    found: dict[str, list[float]] = {}
    names: dict[str, str] = {}
    with closing(sqlite3.connect(journal / "index.sqlite")) as index:
        for incarnation, body in index.execute("SELECT incarnation, body FROM hello"):
            hello = frames.decode(body)[1]
            names[incarnation] = hello.name if isinstance(hello, Hello) else ""
    for segment in sorted(journal.glob("segment-*.sqlite")):
        with closing(sqlite3.connect(segment)) as messages:
            query = "SELECT incarnation, body FROM message WHERE kind = ? ORDER BY incarnation, sequence"
            for incarnation, body in messages.execute(query, (int(Kind.STEP_END),)):
                end = frames.decode(body)[1]
                if isinstance(end, StepEnd) and end.step >= first:
                    found.setdefault(names[incarnation], []).append(1e3 * end.hook_seconds)
    return found


def milliseconds(steps: Sequence[Step], *, first: int) -> dict[str, dict[str, float]]:
    """Mean, median, p99 and maximum by clock, in ms, of the steps from ``first`` on."""
    counted = [step for step in steps if step["step"] >= first]
    return {clock: spread([1e3 * step[clock] for step in counted]) for clock in CLOCKS}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, p99 and maximum."""
    ordered = sorted(values)
    return {
        "mean": statistics.mean(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": ordered[-1],
    }


def machine() -> Mapping[str, Any]:
    """What the figures were taken on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "processor": names[0] if names else platform.processor(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }
