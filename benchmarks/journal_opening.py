"""How long a worker takes to open a journal: one segment of a million messages, many full ones, and many runs.

    python benchmarks/journal_opening.py [--quick] [--json FILE]

Opening reads the newest segment's index of arrivals; full segments are known from the index; bodies are not read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Hello, Notice
from sidestep.worker.intake.decisions import Closure, ContextRecord, Ending, Incarnation
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.segments import Row
from sidestep.worker.outbox import entry
from sidestep.worker.pipeline import RunPipeline
from sidestep.worker.records import StepClosing

_COMMIT_ROWS = 5_000


def rows(run_id: str, incarnation: str, *, ranks: int, first_arrival: int, count: int, body_bytes: int) -> list[Row]:
    """Return messages of ranks in turn, as they would arrive."""
    text = "x" * max(0, body_bytes - 120)
    made = []
    for arrival in range(first_arrival, first_arrival + count):
        rank, sequence = arrival % ranks, arrival // ranks + 1
        envelope = Envelope(run_id=run_id, incarnation=incarnation, rank=rank, sequence=sequence)
        made.append(Row(incarnation, rank, sequence, 13, -1, 1, 0, 1.5, arrival, encode(envelope, Notice(text=text))))
    return made


def add_run(journal: Journal, run_id: str, incarnation: str, ranks: int) -> None:
    """Register a run."""
    made = Incarnation(
        incarnation=incarnation, run_id=run_id, attempt=-1, first_seen=1.0, world_size=ranks, start_step=0
    )
    body = encode(Envelope(run_id=run_id, incarnation=incarnation, rank=0), Hello())
    journal.index.add_hello(made, 0, 1.0, body)


def timed(open_it: Callable[[], Journal]) -> float:
    """Return the seconds that opening takes."""
    before = time.perf_counter()
    journal = open_it()
    seconds = time.perf_counter() - before
    journal.close()
    return seconds


def one_segment(folder: Path, messages: int, body_bytes: int, *, full_segments: bool) -> dict[str, float]:
    """Return how long it takes to open a journal of so many messages in one open segment, or in full ones of 64 MiB."""
    segment_bytes = 1 << 26 if full_segments else 1 << 40
    journal = Journal(folder, segment_bytes=segment_bytes)
    add_run(journal, "run", "inc", 8)
    for first in range(0, messages, _COMMIT_ROWS):
        journal.segments.append(
            rows(
                "run",
                "inc",
                ranks=8,
                first_arrival=first,
                count=min(_COMMIT_ROWS, messages - first),
                body_bytes=body_bytes,
            )
        )
    journal.close()
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "messages": messages,
        "gib": size_bytes / (1 << 30),
        "segments": len(list(folder.glob("segment-*.sqlite"))),
        "open_seconds": timed(lambda: Journal(folder, segment_bytes=segment_bytes)),
    }


def many_runs(folder: Path, num_runs: int, steps: int) -> dict[str, float]:
    """Return how long it takes to open a journal of so many ended runs, and to make their pipelines."""
    journal = Journal(folder)
    for number in range(num_runs):
        run_id, incarnation = f"run-{number:05d}", f"inc-{number:05d}"
        add_run(journal, run_id, incarnation, 1)
        first = journal.segments.next_arrival
        sent = rows(run_id, incarnation, ranks=1, first_arrival=first, count=steps, body_bytes=300)
        journal.segments.append([row._replace(sequence=at + 1) for at, row in enumerate(sent)])
        context = ContextRecord(run_id=run_id, attempt=0, revision=0, incarnation=incarnation, ranks=())
        closures = [Closure(closing=context, entries=(entry("run", {}),))]
        for step in range(steps):
            closing = StepClosing(
                run_id=run_id, attempt=0, step=step, reason="complete", incarnation=incarnation, parts=((0, step + 1),)
            )
            closures.append(
                Closure(
                    closing=closing,
                    entries=(entry("row", {"train/step": step}),),
                    pending_arrival=first + step + 1,
                    last_arrival=first + step,
                )
            )
        ending = Ending(
            run_id=run_id, attempt=0, exit_code=0, reason="", tail_unknown=False, unix_time=1.0, newest_step=steps - 1
        )
        closures.append(Closure(closing=ending, pending_arrival=journal.segments.next_arrival))
        journal.index.write(run_id, closures)
    journal.close()
    seconds = timed(lambda: Journal(folder))
    journal = Journal(folder)
    before = time.perf_counter()
    for run_id in journal.index.runs():
        RunPipeline(journal, run_id, deadline_seconds=30.0).recovery_start()
    pipelines = time.perf_counter() - before
    journal.close()
    return {"runs": num_runs, "steps_each": steps, "open_seconds": seconds, "pipelines_seconds": pipelines}


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description="How long a worker takes to open a journal.")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    part = 10 if options.quick else 1
    folder = Path(tempfile.mkdtemp(prefix="sidestep-opening-"))
    try:
        figures = {
            "open_segment": one_segment(folder / "open", 1_000_000 // part, 1_000, full_segments=False),
            "full_segments": one_segment(folder / "full", 1_000_000 // part, 1_000, full_segments=True),
            "many_runs": many_runs(folder / "runs", 1_000 // part, 50),
        }
    finally:
        shutil.rmtree(folder)
    for name, figure in figures.items():
        print(f"{name:14}", "  ".join(f"{key} {value:.3g}" for key, value in figure.items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
