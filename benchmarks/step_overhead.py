"""What a training step costs without hooks, with Sidestep's, and with the same metrics taken inline.

    python benchmarks/step_overhead.py [--quick] [--json FILE]

Every mode trains the digits demo in a process of its own; the processes take turns of a few optimizer steps, so that
all modes see the same machine at the same time. A real worker runs beside them. Reported per mode: wall time, CPU of
the training thread and of the whole process per step, mean and median; and the CPU of every call of the hooks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sidestep.protocol import frames
from sidestep.protocol.messages import Hello, Kind, StepEnd

MODES = ("none", "sidestep_without_generation", "sidestep", "inline_without_generation", "inline")
TURN_STEPS = 5
WARMUP_STEPS = 10
SHORTEST_INTERVAL_STEPS = 25
"""Of the defaults of ``HooksConfig``, which all modes use; the others are multiples of it."""


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


class NoHooks:
    """Calls that do nothing: what timing a call costs by itself is taken off every mode."""

    def on_batch(self, **_: Any) -> None:
        """Do nothing."""

    def before_clip(self) -> None:
        """Do nothing."""

    def after_step(self, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Turns:
    """An observer of the demo's loop that stops every few steps until it is this process' turn again."""

    def __init__(self, pipe: Any, timed: TimedCalls) -> None:
        self._pipe, self._timed = pipe, timed
        self._steps: list[dict[str, Any]] = []
        self._pipe.recv()
        self._stamp()

    def _stamp(self) -> None:
        self._at = (time.perf_counter(), time.thread_time(), time.process_time())

    def after_forward(self, *_: Any) -> None:
        """Nothing to see here."""

    def before_clip(self, *_: Any) -> None:
        """Nor here."""

    def after_step(self, step: int, *_: Any) -> None:
        """Keep what the step cost; hand over at the end of a turn."""
        now = (time.perf_counter(), time.thread_time(), time.process_time())
        wall, thread_cpu, process_cpu = (b - a for a, b in zip(self._at, now, strict=True))
        calls = self._timed.calls
        self._steps.append(
            {"step": step, "wall": wall, "thread_cpu": thread_cpu, "process_cpu": process_cpu, "calls": list(calls)}
        )
        calls.clear()
        if len(self._steps) == TURN_STEPS:
            self._pipe.send(self._steps)
            self._steps = []
            self._pipe.recv()
        self._stamp()


def train_in_turns(mode: str, num_steps: int, threads: int, pipe: Any) -> None:
    """Train the demo in ``mode``, turn by turn; runs in a process of its own."""
    import torch  # noqa: PLC0415  # each process imports it for itself
    from benchmarks.inline_logger import InlineLogger  # noqa: PLC0415

    import sidestep  # noqa: PLC0415
    from sidestep.examples.digits_vqa.settings import Settings  # noqa: PLC0415
    from sidestep.examples.digits_vqa.training import build, generation_samples, train  # noqa: PLC0415

    torch.set_num_threads(threads)
    training = build(Settings(num_steps=num_steps + 1))
    config = sidestep.HooksConfig()  # 16 samples of at most 64 new tokens
    hooks: Any = NoHooks()
    if mode.startswith("sidestep"):
        if mode.endswith("without_generation"):
            config = replace(config, generation_eval_interval=0, collapse_detection_interval=0)
        hooks = sidestep.attach(
            training.model, training.optimizer, tokenizer=training.tokenizer, samples=generation_samples(training),
            config=config, project="benchmark", name=mode,
        )  # fmt: skip
    elif mode.startswith("inline"):
        hooks = InlineLogger(training, config, generate=mode == "inline")
    timed: Any = TimedCalls(hooks)
    pipe.send("ready")
    losses = train(training, timed, Turns(pipe, timed))
    hooks.close()
    pipe.send(losses)


@contextmanager
def worker(folder: Path) -> Any:
    """A real worker beside the trainers, for as long as the block lasts."""
    environment = {**os.environ, "SIDESTEP_HOME": str(folder / "home"), "WANDB_MODE": "offline"}
    endpoint = f"ipc://{folder}/w.sock"
    command = [
        sys.executable,
        "-m",
        "sidestep.worker.cli",
        "worker",
        "--endpoint",
        endpoint,
        "--out",
        str(folder / "out"),
    ]
    folder.chmod(0o700)
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    os.environ["SIDESTEP_ENDPOINT"] = endpoint
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def hook_milliseconds(journal: Path) -> dict[str, list[float]]:
    """Return what the hooks themselves counted per step, by the name of the run: calls and hooks on the model alike."""
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
                if isinstance(end, StepEnd) and end.step >= WARMUP_STEPS:
                    found.setdefault(names[incarnation], []).append(1e3 * end.hook_seconds)
    return found


def measure(num_steps: int, threads: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[float]], bool]:
    """Return each mode's steps, what the hooks counted, and whether all modes trained with the very same losses."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as folder, worker(Path(folder)):
        for mode in MODES:
            pipes[mode], theirs = context.Pipe()
            processes[mode] = context.Process(target=train_in_turns, args=(mode, num_steps, threads, theirs))
            processes[mode].start()
        for pipe in pipes.values():
            pipe.recv()
        steps: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for _ in range(num_steps // TURN_STEPS):
            for mode in MODES:
                pipes[mode].send("go")
                steps[mode] += pipes[mode].recv()
        for pipe in pipes.values():
            pipe.send("go")
        losses = {mode: pipes[mode].recv() for mode in MODES}
        for process in processes.values():
            process.join(timeout=60)
        time.sleep(1.0)  # the worker stores what the goodbyes have just brought
        counted = hook_milliseconds(Path(folder) / "out" / "journal")
    return steps, counted, all(values == losses["none"] for values in losses.values())


def summary(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a mode's step times in ms."""
    counted = [step for step in steps if step["step"] >= WARMUP_STEPS]
    found: dict[str, Any] = {"num_steps": len(counted)}
    for name in ("wall", "thread_cpu", "process_cpu"):
        values = [1e3 * step[name] for step in counted]
        found[f"{name}_mean_ms"], found[f"{name}_median_ms"] = statistics.mean(values), statistics.median(values)
    in_calls = [1e3 * sum(cpu for _, cpu, _ in step["calls"]) for step in counted]
    found["calls_cpu_mean_ms"] = statistics.mean(in_calls)
    return found


def per_call(steps: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, p99 and maximum of each call's CPU in ms; ``idle``: steps at which no family is due."""
    found: dict[str, dict[str, float]] = {}
    groups: dict[str, list[float]] = {}
    for step in steps:
        due = step["step"] % SHORTEST_INTERVAL_STEPS == 0
        if step["step"] >= WARMUP_STEPS:
            for name, cpu, _ in step["calls"]:
                groups.setdefault(f"{name} ({'due' if due else 'nothing due'})", []).append(1e3 * cpu)
    for name, values in sorted(groups.items()):
        ordered = sorted(values)
        found[name] = {
            "calls": len(values), "median": statistics.median(values), "mean": statistics.mean(values),
            "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], "max": ordered[-1],
        }  # fmt: skip
    return found


def table(result: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = [
        "| mode | wall, mean (median) ms | thread CPU ms | process CPU ms | in calls, CPU ms/step | share of a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for mode, row in result["modes"].items():
        cells = [
            f"{row[f'{n}_mean_ms']:.1f} ({row[f'{n}_median_ms']:.1f})" for n in ("wall", "thread_cpu", "process_cpu")
        ]
        lines.append(
            f"| {mode} | {' | '.join(cells)} | {row['calls_cpu_mean_ms']:.3f} | {result['share_of_step'][mode]:.2%} |"
        )
    lines += [
        "",
        "| Sidestep's call, without generation | calls | median ms | p99 ms | max ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in result["per_call_ms"].items():
        lines.append(f"| {name} | {row['calls']} | {row['median']:.3f} | {row['p99']:.3f} | {row['max']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch in each mode (%(default)s)")
    options = parser.parse_args()
    num_steps = 60 if options.quick else 210
    steps, counted, identical = measure(num_steps, options.threads)
    modes = {mode: summary(steps[mode]) for mode in MODES}
    none = modes["none"]
    share = {
        mode: (modes[mode]["calls_cpu_mean_ms"] - none["calls_cpu_mean_ms"]) / none["thread_cpu_mean_ms"]
        for mode in MODES
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "steps_per_mode": num_steps,
        "losses_identical_in_all_modes": identical,
        "hooks_share_of_step": share["sidestep_without_generation"],
        "hooks_with_generation_share_of_step": share["sidestep"],
        "inline_share_of_step": share["inline"],
        "inline_without_generation_share_of_step": share["inline_without_generation"],
        "share_of_step": share,
        "hooks_own_count_mean_ms": {name: statistics.mean(values) for name, values in counted.items()},
        "per_call_ms": per_call(steps["sidestep_without_generation"]),
        "modes": modes,
    }
    print(table(result))
    for name, mean in result["hooks_own_count_mean_ms"].items():
        print(
            f"\n{name}: {mean:.3f} ms a step by the hooks' own count, which has the hooks on model and optimizer too",
            end="",
        )
    print(f"\nlosses identical in all modes: {identical}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
