"""What a worker that stands still costs the training, while it does and while it is caught up with.

    python benchmarks/stalled_worker.py [--quick] [--stall-seconds S] [--window-mib N] [--json FILE]

Two processes train the same small model: one with hooks and a real worker, one without (the control). They take turns
of ``TURN_STEPS`` steps; who waits for its turn is stopped (SIGSTOP), its publisher's thread with it, so that neither
sees the other and nothing is carried for free. After a while the worker is stopped, for ``--stall-seconds`` of the
training's own time, then continued. Reported per phase (before, stalled, catching up, after): wall and process CPU of a
step against the control's in the same turns; the hooks' calls at steps with nothing due, p99.9 and slowest, against the
control's, which do a little Python work in their place; the same at due steps, which measure something first and so
cost the same in all phases; resident memory against the declared budget; and whether the accounts balanced at every
step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TURN_STEPS = 10
WARMUP_TURNS = 3
INTERVAL_STEPS = 10
"""Between two reports of each family: some hundred messages a second, of which a stall makes thousands."""
MODES = ("sidestep", "control")
PHASES = ("before", "stalled", "catching_up", "after")
CATCHING_UP_AT_MOST_SECONDS = 180.0
GOAL_MS = 1.0
_VOCABULARY, _WIDTH, _ROWS, _LENGTH = 512, 128, 6, 96


class Calls:
    """Times calls."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        self.due = False
        """Whether something is due at this step."""

    def time(self, function: Callable[..., object], *arguments: object, **named: object) -> None:
        """Call ``function`` and keep how long that took."""
        began = time.perf_counter()
        function(*arguments, **named)
        self.seconds[self.due].append(time.perf_counter() - began)

    def take(self) -> dict[bool, list[float]]:
        """Return the seconds of each call since the last time, by whether something was due."""
        taken, self.seconds = self.seconds, {False: [], True: []}
        return taken


class NoHooks:
    """In place of the hooks: a few ten microseconds of Python, in which the machine may interfere as in a hook."""

    def on_batch(self, **_: object) -> None:
        """Work a little."""
        sum(range(3_000))

    def before_clip(self) -> None:
        """Work a little."""
        sum(range(3_000))

    def after_step(self, _step: int) -> None:
        """Work a little."""
        sum(range(3_000))

    def close(self) -> None:
        """Do nothing."""


def make_model() -> Any:
    """Return a small language model: logits [b, t, v] from ids [b, t]."""
    import torch  # noqa: PLC0415  # each process imports it for itself
    from torch import nn  # noqa: PLC0415

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(_WIDTH, 4, 2 * _WIDTH, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Embedding(_VOCABULARY, _WIDTH),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(_WIDTH, _VOCABULARY),
    )


class Tokenizer:
    """Ids as texts."""

    eos_token_id = 0
    pad_token_id = 0
    all_special_ids = (0,)

    def __len__(self) -> int:
        return _VOCABULARY

    def decode(self, ids: list[int]) -> str:
        """Return a text."""
        return " ".join(map(str, ids))


class Trainer:
    """One training, in a process of its own."""

    def __init__(self, mode: str, window_bytes: int) -> None:
        import torch  # noqa: PLC0415

        torch.set_num_threads(1)
        self._torch = torch
        self._model = make_model()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._batches = torch.Generator().manual_seed(1)
        self._step = 0
        self.calls = Calls()
        self.losses: list[str] = []
        self.publisher: Any = None
        self.hooks: Any = NoHooks() if mode == "control" else self._attach(window_bytes)

    def _attach(self, window_bytes: int) -> Any:
        import sidestep  # noqa: PLC0415
        from sidestep.trainer_hooks.publisher import Publisher  # noqa: PLC0415

        def publish(identity: Any, hello: Any, blobs: Mapping[str, bytes], staging: Any) -> Any:
            self.publisher = Publisher(
                os.environ["SIDESTEP_ENDPOINT"], identity, hello, blobs=blobs, source=staging,
                window_bytes=window_bytes,
            ).start()  # fmt: skip
            return self.publisher

        config = sidestep.HooksConfig(
            token_stats_interval=INTERVAL_STEPS,
            loss_breakdown_interval=INTERVAL_STEPS,
            lr_interval=INTERVAL_STEPS,
            gradient_log_interval=INTERVAL_STEPS,
            answer_length_interval=INTERVAL_STEPS,
        )
        return sidestep.attach(
            self._model, self._optimizer, tokenizer=Tokenizer(), config=config, project="benchmark",
            name="stalled-worker", transport=publish,
        )  # fmt: skip

    def train(self, num_steps: int) -> dict[str, Any]:
        """Train some steps; return what they cost, and what the publisher says of itself after each."""
        found: dict[str, Any] = {"steps": num_steps, "unbalanced": 0, "samples": 0, "in_window": 0, "window_bytes": 0}
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(num_steps):
            self._train_step()
            self._sample(found)
        found["wall_seconds"] = time.perf_counter() - wall
        found["cpu_seconds"] = time.process_time() - cpu
        found["rss_bytes"] = resident_bytes()
        return {**found, "calls": self.calls.take()}

    def _train_step(self) -> None:
        functional = self._torch.nn.functional
        self.calls.due = self._step % INTERVAL_STEPS == 0
        ids = self._torch.randint(1, _VOCABULARY, (_ROWS, _LENGTH), generator=self._batches)
        labels = ids.clone()
        labels[:, : _LENGTH // 2] = -100
        logits = self._model(ids)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        self.calls.time(
            self.hooks.on_batch, input_ids=ids, labels=labels, logits=logits.detach(), loss=loss.detach(), shifted=False
        )
        loss.backward()
        self.calls.time(self.hooks.before_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.calls.time(self.hooks.after_step, self._step)
        self.losses.append(loss.item().hex())
        self._step += 1

    def _sample(self, found: dict[str, Any]) -> None:
        if self.publisher is None:
            return
        accounts = self.publisher.accounts().values()
        found["samples"] += 1
        found["unbalanced"] += any(a.produced != a.accepted + a.refused + a.dropped + a.in_window for a in accounts)
        found["in_window"] = sum(account.in_window for account in accounts)
        found["window_bytes"] = max(found["window_bytes"], self.publisher.statistics().window_bytes)

    def end(self) -> dict[str, Any]:
        """Close the hooks; return the accounts in the end."""
        self.hooks.close()
        if self.publisher is None:
            return {"losses": self.losses}
        accounts = self.publisher.accounts()
        names = ("produced", "accepted", "refused", "dropped", "in_window")
        return {
            "losses": self.losses,
            "accounts": {name: sum(getattr(a, name) for a in accounts.values()) for name in names},
            "dropped_by_kind": {kind.name.lower(): a.dropped for kind, a in accounts.items() if a.dropped},
            "num_resends": self.publisher.statistics().num_resends,
            "num_connections": self.publisher.statistics().num_connections,
        }


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def train_in_turns(mode: str, window_bytes: int, pipe: Any) -> None:
    """Train when told to; runs in a process of its own."""
    trainer = Trainer(mode, window_bytes)
    pipe.send("ready")
    while (num_steps := pipe.recv()) > 0:
        pipe.send(trainer.train(num_steps))
    pipe.send(trainer.end())


@dataclass(slots=True)
class Turns:
    """The trainers, of which one at a time runs; the others are stopped, threads and all."""

    processes: dict[str, Any] = field(default_factory=dict)
    pipes: dict[str, Any] = field(default_factory=dict)

    def start(self, mode: str, window_bytes: int) -> None:
        """Start a trainer, and stop it once it is ready."""
        context = multiprocessing.get_context("spawn")
        self.pipes[mode], theirs = context.Pipe()
        self.processes[mode] = context.Process(target=train_in_turns, args=(mode, window_bytes, theirs))
        self.processes[mode].start()
        self.pipes[mode].recv()
        os.kill(self.processes[mode].pid, signal.SIGSTOP)

    def take(self, mode: str, num_steps: int) -> dict[str, Any]:
        """Let one trainer train; return what it says, or with 0 steps what it says in the end."""
        os.kill(self.processes[mode].pid, signal.SIGCONT)
        self.pipes[mode].send(num_steps)
        said: dict[str, Any] = self.pipes[mode].recv()
        if num_steps:
            os.kill(self.processes[mode].pid, signal.SIGSTOP)
        return said

    def stop(self) -> None:
        """End all of them, however it goes."""
        for process in self.processes.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
            process.join(timeout=20)
            if process.is_alive():
                process.kill()


def run_phase(turns: Turns, name: str, is_over: Callable[[float, Mapping[str, Any]], bool]) -> dict[str, list[Any]]:
    """Let the trainers take turns until ``is_over(seconds of training with hooks, what was said last)``."""
    said: dict[str, list[Any]] = {mode: [] for mode in MODES}
    seconds = 0.0
    while not said["control"] or not is_over(seconds, said["sidestep"][-1]):
        for mode in MODES if len(said["control"]) % 2 == 0 else reversed(MODES):
            said[mode].append(turns.take(mode, TURN_STEPS))
        seconds += said["sidestep"][-1]["wall_seconds"]
    print(f"{name}: {len(said['sidestep']) * TURN_STEPS} steps with hooks in {seconds:.1f} s", file=sys.stderr)
    return said


def measure(stall_seconds: float, around_seconds: float, window_bytes: int) -> dict[str, Any]:
    """Return what was said in each phase and in the end, and how many messages the journal holds."""
    from benchmarks.turns import worker_beside  # noqa: PLC0415  # found once the path is set

    cores = sorted(os.sched_getaffinity(0))
    worker_core = cores[-1] if len(cores) > 1 else None
    turns = Turns()
    with (
        tempfile.TemporaryDirectory(prefix="sidestep-bench-") as folder,
        worker_beside(Path(folder), core=worker_core) as worker,
    ):
        try:
            for mode in MODES:
                turns.start(mode, window_bytes)
            for mode in MODES:
                for _ in range(WARMUP_TURNS):
                    turns.take(mode, TURN_STEPS)
            phases = {"before": run_phase(turns, "before", lambda seconds, _: seconds >= around_seconds)}
            worker.send_signal(signal.SIGSTOP)
            phases["stalled"] = run_phase(turns, "stalled", lambda seconds, _: seconds >= stall_seconds)
            worker.send_signal(signal.SIGCONT)
            usual = max(block["in_window"] for block in phases["before"]["sidestep"])
            phases["catching_up"] = run_phase(
                turns,
                "catching up",
                lambda seconds, last: last["in_window"] <= usual or seconds >= CATCHING_UP_AT_MOST_SECONDS,
            )
            phases["after"] = run_phase(turns, "after", lambda seconds, _: seconds >= around_seconds)
            ends = {mode: turns.take(mode, 0) for mode in MODES}
        finally:
            worker.send_signal(signal.SIGCONT)
            turns.stop()
        return {"phases": phases, "ends": ends, "journaled": journaled(Path(folder) / "out" / "journal")}


def journaled(journal: Path) -> int:
    """Return how many messages are in the journal's segments."""
    total = 0
    for segment in sorted(journal.glob("segment-*.sqlite")):
        with closing(sqlite3.connect(segment)) as messages:
            total += int(messages.execute("SELECT count(*) FROM message").fetchone()[0])
    return total


def call_figures(calls: Sequence[float]) -> dict[str, float]:
    """Return median, p99.9 and slowest of calls in ms."""
    ordered = sorted(calls)
    at = min(len(ordered) - 1, int(0.999 * len(ordered)))
    return {
        "calls": len(ordered),
        "median_ms": 1e3 * statistics.median(ordered),
        "p99_9_ms": 1e3 * ordered[at],
        "slowest_ms": 1e3 * ordered[-1],
    }


def phase_figures(said: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return a phase's figures for each mode, and what the hooks add."""
    found: dict[str, Any] = {}
    for mode, blocks in said.items():
        found[mode] = {
            "steps": sum(block["steps"] for block in blocks),
            "wall_ms": statistics.median(1e3 * block["wall_seconds"] / block["steps"] for block in blocks),
            "process_cpu_ms": statistics.median(1e3 * block["cpu_seconds"] / block["steps"] for block in blocks),
            **call_figures([seconds for block in blocks for seconds in block["calls"][False]]),
            "due": call_figures([seconds for block in blocks for seconds in block["calls"][True]]),
            "rss_bytes": max(block["rss_bytes"] for block in blocks),
        }
    for name in ("wall_ms", "process_cpu_ms"):
        found[f"added_{name}"] = found["sidestep"][name] - found["control"][name]
    hooked = said["sidestep"]
    found |= {
        "samples": sum(block["samples"] for block in hooked),
        "unbalanced_samples": sum(block["unbalanced"] for block in hooked),
        "most_in_window": max(block["in_window"] for block in hooked),
        "window_bytes": max(block["window_bytes"] for block in hooked),
    }
    return found


def summary(measured: Mapping[str, Any], window_bytes: int) -> dict[str, Any]:
    """Return the figures, and what they are to be."""
    from sidestep.protocol.limits import CHUNK_BYTES, SEND_HIGH_WATER_MARK_MESSAGES  # noqa: PLC0415

    phases = {name: phase_figures(measured["phases"][name]) for name in PHASES}
    everything = {
        mode: call_figures(
            [s for said in measured["phases"].values() for block in said[mode] for s in block["calls"][False]]
        )
        for mode in MODES
    }
    ends = measured["ends"]
    budget = window_bytes + SEND_HIGH_WATER_MARK_MESSAGES * CHUNK_BYTES
    grown = max(phase["sidestep"]["rss_bytes"] for phase in phases.values()) - phases["before"]["sidestep"]["rss_bytes"]
    worst_allowed = everything["control"]["slowest_ms"] + GOAL_MS
    return {
        "phases": phases,
        "calls": everything,
        "accounts": ends["sidestep"]["accounts"],
        "dropped_by_kind": ends["sidestep"]["dropped_by_kind"],
        "num_resends": ends["sidestep"]["num_resends"],
        "num_connections": ends["sidestep"]["num_connections"],
        "journaled_messages": measured["journaled"],
        "memory_budget_bytes": budget,
        "memory_grown_bytes": grown,
        "losses_identical": ends["sidestep"]["losses"] == ends["control"]["losses"][: len(ends["sidestep"]["losses"])],
        "met": {
            "p99_9_call_within_1_ms": everything["sidestep"]["p99_9_ms"] <= GOAL_MS,
            "slowest_call_within_controls_plus_1_ms": everything["sidestep"]["slowest_ms"] <= worst_allowed,
            "memory_within_budget": grown <= budget,
            "accounts_balanced_at_every_sample": not sum(p["unbalanced_samples"] for p in phases.values()),
            "all_accepted_are_journaled": ends["sidestep"]["accounts"]["accepted"] == measured["journaled"],
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the figures for people."""
    head = ["phase", "steps", "wall a step, hooks / control ms", "process CPU ms", "calls p99.9 / slowest ms"]
    head += ["control's", "calls at due steps, median / slowest ms", "most in window", "RSS MiB"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, phase in result["phases"].items():
        ours, control = phase["sidestep"], phase["control"]
        cells = [
            name.replace("_", " "),
            str(ours["steps"]),
            f"{ours['wall_ms']:.2f} / {control['wall_ms']:.2f}",
            f"{ours['process_cpu_ms']:.2f} / {control['process_cpu_ms']:.2f}",
            f"{ours['p99_9_ms']:.3f} / {ours['slowest_ms']:.3f}",
            f"{control['p99_9_ms']:.3f} / {control['slowest_ms']:.3f}",
            f"{ours['due']['median_ms']:.3f} / {ours['due']['slowest_ms']:.3f}",
            str(phase["most_in_window"]),
            f"{ours['rss_bytes'] / (1 << 20):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    grown, budget = result["memory_grown_bytes"] / (1 << 20), result["memory_budget_bytes"] / (1 << 20)
    stored = f"{result['journaled_messages']} in the journal"
    again = f"{result['num_resends']} sent again over {result['num_connections']} connections"
    lines += [
        "",
        f"accounts: {result['accounts']}, dropped {result['dropped_by_kind']}; {stored}; {again}",
        f"memory grew by {grown:.1f} MiB, the budget is {budget:.0f} MiB",
        f"losses identical: {result['losses_identical']}; met: {result['met']}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a stall of 8 s instead of 60, under a minute and a half")
    parser.add_argument("--stall-seconds", type=float, default=None, help="of the training's own time (60)")
    parser.add_argument("--window-mib", type=int, default=64, help="the publisher's window (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    stall_seconds = options.stall_seconds or (8.0 if options.quick else 60.0)
    window_bytes = options.window_mib << 20
    measured = measure(stall_seconds, 4.0 if options.quick else 30.0, window_bytes)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "stall_seconds": stall_seconds,
        **summary(measured, window_bytes),
    }
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
