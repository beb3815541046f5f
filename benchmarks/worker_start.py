"""How long a worker takes to start on a journal with many ended runs, and how much of it the runs themselves are.

    python -m benchmarks.worker_start [--runs 1000] [--steps 20] [--quick] [--json FILE]

The journal is written by the worker's own parts. Then the runs are opened as a worker does it (ended runs stay settled,
worker/settled.py), and beside it with a pipeline of each, as it was before; and a real worker process is started until
it listens, and asked for its health.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Goodbye, Hello, LearningRates, Message, StepEnd
from sidestep.protocol.tables import digest, encode_table
from sidestep.worker.health import ask_health
from sidestep.worker.intake.feed import Feed
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.reception import Reception
from sidestep.worker.pipeline import RunPipeline
from sidestep.worker.settled import open_runs

QUICK_RUNS, QUICK_STEPS = 40, 5
TOKENIZER = encode_table(
    {"kind": "texts", "texts": {number: f"word {number}" for number in range(5_000)}, "eos_id": 0}
)  # fmt: skip


def messages(num_steps: int) -> list[Message]:
    """Return all that a small trainer says."""
    import numpy as np  # noqa: PLC0415  (the process that is measured is another one)

    said: list[Message] = []
    for step in range(num_steps):
        said.append(LearningRates(step=step, rates=np.array([0.1])))
        said.append(StepEnd(step=step, unix_time=1_700_000_000.0 + step, sent={"learning_rates": 1}))
    return [*said, Goodbye(newest_step=num_steps - 1)]


def write_journal(folder: Path, num_runs: int, num_steps: int) -> None:
    """Write ``num_runs`` runs that have ended."""
    journal = Journal(folder)
    feed = Feed(journal.segments, limit_bytes=1 << 26, start_arrival=0)
    reception = Reception(journal, feed, instance="w", commit_interval_seconds=0.0, commit_messages=1)
    journal.index.add_blob(digest(TOKENIZER), TOKENIZER, 0.0)
    for number in range(num_runs):
        name = f"run-{number:05d}"
        hello = Hello(name=name, tables={"tokenizer": digest(TOKENIZER)}, settings={"lr_interval": 1})
        envelope = Envelope(run_id=name, incarnation=f"inc-{name}", rank=0)
        reception.take(name.encode(), encode(envelope, hello), 0.0)
        for sequence, message in enumerate(messages(num_steps), 1):
            reception.take(name.encode(), encode(envelope._replace(sequence=sequence), message), 0.0)
        reception.commit(0.0)
        feed.take_events()
        pipeline = RunPipeline(journal, name, deadline_seconds=30.0)
        while taken := feed.take():
            for each in taken:
                pipeline.add(each, 0.0)
        while pipeline.advance(0.0, {}).closings:
            pass
        if not pipeline.is_ended:
            raise RuntimeError(f"{name} has not ended")
    journal.close()


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds ``work`` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def start_worker(folder: Path) -> dict[str, float]:
    """Start a real worker on the journal; return how long until it listens, and how long its health takes to tell."""
    with tempfile.TemporaryDirectory(prefix="ss-") as place:
        command = [sys.executable, "-m", "sidestep.worker.cli", "worker", "--endpoint", f"ipc://{place}/s"]
        environment = {**os.environ, "SIDESTEP_HOME": place, "OMP_NUM_THREADS": "1"}
        begin = time.perf_counter()
        worker = subprocess.Popen(
            [*command, "--journal", str(folder), "--out", place, "--wandb-mode", "disabled"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            if worker.stdout is None or "listening" not in worker.stdout.readline():
                raise RuntimeError("the worker did not start")
            listening = time.perf_counter() - begin
            told: dict[str, float] = {"health_seconds": timed(lambda: ask_health(folder))}
            if not ask_health(folder)["healthy"]:
                raise RuntimeError("the worker is not healthy")
        finally:
            worker.terminate()
            worker.wait(60)
    return {"listening_seconds": listening, **told}


def measure(num_runs: int, num_steps: int) -> dict[str, float]:
    """Return all figures, in seconds."""
    with tempfile.TemporaryDirectory(prefix="ss-") as place:
        folder = Path(place) / "journal"
        write_journal(folder, num_runs, num_steps)
        journal = Journal(folder)

        def make(run_id: str) -> RunPipeline:
            return RunPipeline(journal, run_id, deadline_seconds=30.0)

        settled = timed(lambda: open_runs(journal, make))
        woken = timed(lambda: [make(run_id).recovery_start() for run_id in journal.index.runs()])
        journal.close()
        return {
            "runs": num_runs,
            "settled_seconds": settled,
            "a_pipeline_each_seconds": woken,
            **start_worker(folder),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="few runs: shows that it works, not how fast")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    num_runs, num_steps = (QUICK_RUNS, QUICK_STEPS) if options.quick else (options.runs, options.steps)
    figures = measure(num_runs, num_steps)
    for name, value in figures.items():
        print(f"{name:26} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
