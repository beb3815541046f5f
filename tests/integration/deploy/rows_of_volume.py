"""Counts what the worker's volume holds: `python rows_of_volume.py JOURNAL RUNS STEPS`, run in the worker's image.

Each of the newest RUNS runs must have its STEPS steps closed once and whole, nothing dropped by the trainer, and row k
of the journal's outbox at place k of W&B's files, once. `.ci/compose` runs it after the worker was killed.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.support.kill_counts import Expected
from tests.support.wandb_offline import OfflineRun, read_fragments

_WHOLE = frozenset({"complete", "tail"})
"""How a step may have closed; a `tail` is what a trainer's last word brought after its last step."""


def newest_runs(journal: Path, count: int) -> list[str]:
    """Return the ids of the runs that began last, the newest first."""
    return [run_id for (run_id,) in _query(journal, "SELECT run_id FROM run ORDER BY created_at DESC LIMIT ?", count)]


def step_problems(journal: Path, run_id: str, expected: Expected, num_steps: int) -> Iterator[str]:
    """Yield what is wrong with the closed steps and the outbox of a run in its journal."""
    closed = _query(journal, "SELECT step, reason FROM step_closed WHERE run_id = ?", run_id)
    steps = Counter(step for step, reason in closed if reason != "tail")
    if steps != Counter(range(num_steps)):
        yield f"{len(steps)} steps of {num_steps} are closed, {steps.total() - len(steps)} of them again"
    if reasons := Counter(reason for _, reason in closed if reason not in _WHOLE):
        yield f"steps are not whole: {dict(reasons)}"
    endings = _query(journal, "SELECT exit_code, tail_unknown FROM ending WHERE run_id = ?", run_id)
    if endings != [(0, 0)]:
        yield f"it should have ended once, in order; its endings (exit code, tail unknown) are {endings}"
    numbers = [entry.row_number for entry in expected.entries if entry.row_number is not None]
    if not numbers or numbers != list(range(len(numbers))):
        yield "its rows are not numbered one by one"
    for _, row in expected.rows:
        if dropped := [key for key, value in row.items() if key.startswith("sidecar/dropped") and value]:
            yield f"at step {row.get('train/step')} the trainer has dropped: {', '.join(dropped)}"


def wandb_problems(expected: Expected, run: OfflineRun) -> Iterator[str]:
    """Yield where W&B's rows are not the outbox's, in number, order and every number in them."""
    if len(run.rows) != len(expected.rows):
        yield f"W&B has {len(run.rows)} rows, the outbox {len(expected.rows)}"
    for at, ((_, wanted), got) in enumerate(zip(expected.rows, run.rows, strict=False)):
        if differing := [key for key, value in _numbers(wanted).items() if got.get(key) != value]:
            yield f"W&B's row {at} differs in {', '.join(sorted(differing)[:5])}"
    if run.exit_codes[-1:] != [0]:
        yield f"W&B's fragments ended with {run.exit_codes}"


def fragments_of(folder: Path, run_id: str) -> OfflineRun:
    """Read one run's fragments out of a folder that holds those of several."""
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch) / "wandb"
        alone.mkdir()
        for place in (folder.resolve() / "wandb").glob(f"offline-run-*-{run_id}"):
            (alone / place.name).symlink_to(place)
        return read_fragments(Path(scratch))


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if isinstance(v, int | float | str) and k != "key"}


def _query(journal: Path, text: str, value: object) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{journal / 'index.sqlite'}?mode=ro", uri=True, timeout=10.0)) as index:
        return index.execute(text, (value,)).fetchall()


def main(journal: Path, num_runs: int, num_steps: int) -> int:
    """Say what is there and what is wrong; return 1 where anything is."""
    runs = newest_runs(journal, num_runs)
    wrong = [] if len(runs) == num_runs else [f"{len(runs)} of {num_runs} runs"]
    for run_id in runs:
        expected, logged = Expected.read(journal, run_id), fragments_of(journal.parent, run_id)
        problems = (*step_problems(journal, run_id, expected, num_steps), *wandb_problems(expected, logged))
        wrong += [f"run {run_id}: {problem}" for problem in problems]
        found = f"{num_steps} steps, {len(expected.rows)} rows and tables, {len(logged.own_steps)} W&B fragments"
        sys.stdout.write(f"run {run_id}: {'NOT RIGHT' if problems else 'every one once'}: {found}\n")
    sys.stdout.writelines(f"{problem}\n" for problem in wrong)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
