"""How many ranks one worker serves: up to 4,096 of them simulated, at one step a second.

    python benchmarks/ranks.py [--ranks N] [--seconds S] [--quick] [--json FILE]

Each rank is a real socket that speaks the whole protocol (``simulated_ranks.py``) and says what the hooks of a
data-parallel training say (``rank_messages.py``); 1,024 of them share a process. They talk to ONE real worker that does
all it does for a trainer, its W&B child (offline) included, on the same cores.

A step ends on all ranks at once, and each hands it over at a time of its own within ``--spread`` seconds: a publisher's
tick at that pace. Reported beside messages, bytes and CPU:

- ack lag, per rank and step: from handing the ``StepEnd`` over to hearing that it is on disk, by the rank's clock;
- row lag, per step: from the last rank's ``StepEnd`` to the step's row in the outbox, looked for every 20 ms;
- ``sidecar/lag_seconds``, what the worker itself says in the rows: from the end of the step to its last message;
- the worker's resident memory, and by how much it grew after the first tenth of the steps.

``late`` is by how much the ranks' own processes were late: where it is large the senders are the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import secrets
import sqlite3
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

RANKS_PER_PROCESS: Final = 1_024
INTERVAL_SECONDS: Final = 1.0
SPREAD_SECONDS: Final = 0.2
"""``PUBLISHER_IDLE_TICK_SECONDS``: what a publisher waits for at a step a second."""
_LOOK_SECONDS: Final = 0.02
_SAMPLE_SECONDS: Final = 0.25
_LAST_ROWS_SECONDS: Final = 120.0
_DESCRIPTORS_PER_SOCKET: Final = 3


class Looker:
    """Watches the worker from outside: its steps in the outbox, its memory, CPU and descriptors."""

    def __init__(self, pid: int, index: Path) -> None:
        """Watch process ``pid``, whose journal's index is there."""
        self._pid = pid
        self._index = sqlite3.connect(f"file:{index}?mode=ro", uri=True, timeout=5.0)
        self._number = -1
        self._sampled_at = 0.0
        self.closed_at: dict[int, float] = {}
        """Step to when its row was first seen, on the monotonic clock."""
        self.reasons: Counter[str] = Counter()
        self.resident: list[tuple[float, int]] = []
        """When, and the worker's resident bytes then."""
        self.descriptors = 0

    def look(self) -> None:
        """See what is new."""
        query = "SELECT closed_number, step, reason FROM step_closed WHERE closed_number > ? ORDER BY closed_number"
        for number, step, reason in self._index.execute(query, (self._number,)).fetchall():
            self._number = number
            self.closed_at.setdefault(step, time.monotonic())
            self.reasons[reason] += 1
        now = time.monotonic()
        if now - self._sampled_at >= _SAMPLE_SECONDS:
            self._sampled_at = now
            self.resident.append((now, resident_bytes(self._pid)))
            self.descriptors = max(self.descriptors, sum(1 for _ in Path(f"/proc/{self._pid}/fd").iterdir()))

    def lags_in_rows(self) -> list[float]:
        """Return ``sidecar/lag_seconds`` of all rows."""
        rows = [
            json.loads(payload) for (payload,) in self._index.execute("SELECT payload FROM outbox WHERE kind = 'row'")
        ]
        return [row["sidecar/lag_seconds"] for row in rows if "sidecar/lag_seconds" in row]

    def close(self) -> None:
        """Let go of the index."""
        self._index.close()


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Return user and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_by_thread(pid: int) -> dict[str, float]:
    """Return the CPU seconds of a worker's threads: ``assembly`` (main), ``sockets`` (ZeroMQ's own), ``rest``.

    The rest is the receiver, but for what health and W&B's supervisor take. It shares an interpreter with ``assembly``,
    so that the two together have one core at most but for what SQLite and compression do outside it.
    """
    found = dict.fromkeys(("assembly", "sockets", "rest"), 0.0)
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            head, _, rest = (task / "stat").read_text(encoding="ascii").rpartition(")")
            fields = rest.split()
            name = "sockets" if "ZMQ" in head else "assembly" if task.name == str(pid) else "rest"
            found[name] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has begun, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text(encoding="ascii").split():
                found += [int(child), *descendants(int(child))]
    return found


def cpu_of_all(pids: Sequence[int]) -> float:
    """Return the CPU seconds of those that are still there."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += cpu_seconds(pid)
    return total


def allow_descriptors(wanted: int) -> None:
    """Raise this process's limit of open files, and its children's, to ``wanted``; raises RuntimeError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise RuntimeError(f"{wanted} open files are needed and {hard} allowed: `ulimit -n {wanted}` as root")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def crowds(address: str, run_id: str, num_ranks: int) -> Iterator[list[Connection]]:
    """Start the processes of the ranks; yield a pipe to each."""
    from benchmarks.simulated_ranks import run_ranks  # noqa: PLC0415  # found once the path is set

    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for first in range(0, num_ranks, RANKS_PER_PROCESS):
        pipe, theirs = context.Pipe()
        ranks = range(first, min(first + RANKS_PER_PROCESS, num_ranks))
        process = context.Process(target=run_ranks, args=(address, run_id, ranks, num_ranks, theirs))
        process.start()
        theirs.close()
        pipes.append(pipe)
        processes.append(process)
    try:
        yield pipes
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join(30)


def measure(num_ranks: int, num_steps: int, *, spread_seconds: float = SPREAD_SECONDS) -> dict[str, Any]:
    """Serve ``num_ranks`` ranks for ``num_steps`` steps of a second each.

    Raises:
        RuntimeError: the worker, or a rank's process, ended before its time, or too few files may be opened.
        EOFError: a rank's process ended before its time.
    """
    from benchmarks.turns import worker_beside  # noqa: PLC0415  # found once the path is set

    allow_descriptors(num_ranks + _DESCRIPTORS_PER_SOCKET * min(num_ranks, RANKS_PER_PROCESS) + 256)
    run_id = secrets.token_hex(4)
    with tempfile.TemporaryDirectory(prefix="ss-ranks-") as name, worker_beside(Path(name)) as worker:
        began_at = time.monotonic()
        with crowds(os.environ["SIDESTEP_ENDPOINT"], run_id, num_ranks) as pipes:
            ready = [pipe.recv() for pipe in pipes]
            joined = max(each["joined_at"] for each in ready) - began_at
            print(f"{num_ranks} ranks joined within {joined:.1f} s", file=sys.stderr)
            looker = Looker(worker.pid, Path(name) / "out" / "journal" / "index.sqlite")
            with closing(looker):
                said = _train(pipes, looker, worker.pid, num_steps, spread_seconds)
                health = _health(Path(name) / "out" / "journal")
                for pipe in pipes:
                    pipe.send("end")
                for pipe in pipes:
                    pipe.recv()
                lags_in_rows = looker.lags_in_rows()
    return {
        "ranks": num_ranks,
        "steps": num_steps,
        "joined_seconds": joined,
        **_figures(said, looker, num_steps),
        "worker_lag_p50_seconds": percentile(lags_in_rows, 0.5),
        "worker_lag_p99_seconds": percentile(lags_in_rows, 0.99),
        "worker_descriptors": looker.descriptors,
        "worker_health": health,
    }


def _train(
    pipes: Sequence[Connection], looker: Looker, pid: int, num_steps: int, spread_seconds: float
) -> dict[str, Any]:
    """Let all ranks train; return what they saw, and what it cost until the last step's row."""
    begin_at = time.monotonic() + 1.0
    for pipe in pipes:
        pipe.send((num_steps, begin_at, INTERVAL_SECONDS, spread_seconds))
    others = descendants(pid)
    before, others_before, threads_before = cpu_seconds(pid), cpu_of_all(others), cpu_by_thread(pid)
    said: list[dict[str, Any]] = []
    until = begin_at + num_steps * INTERVAL_SECONDS + _LAST_ROWS_SECONDS
    while len(said) < len(pipes) or len(looker.closed_at) < num_steps:
        looker.look()
        said += [pipe.recv() for pipe in pipes if pipe.poll(0.0)]
        if time.monotonic() > until:
            break
        time.sleep(_LOOK_SECONDS)
    if len(said) < len(pipes):
        raise RuntimeError("the ranks' processes do not come to an end")
    end_at = max([*looker.closed_at.values(), begin_at + num_steps * INTERVAL_SECONDS])
    threads = cpu_by_thread(pid)
    return {
        "crowds": said,
        "begin_at": begin_at,
        "seconds": end_at - begin_at,
        "worker_cpu_seconds": cpu_seconds(pid) - before,
        "worker_threads_cpu_seconds": {name: threads[name] - taken for name, taken in threads_before.items()},
        "wandb_cpu_seconds": cpu_of_all(others) - others_before,
    }


def _figures(said: Mapping[str, Any], looker: Looker, num_steps: int) -> dict[str, Any]:
    crowds = said["crowds"]
    ack_lags = [lag for each in crowds for lag in array("d", each["ack_lags"])]
    late_by = [late for each in crowds for late in array("d", each["late_by"])]
    last_sent = {step: max(each["last_sent_at"][step] for each in crowds) for step in range(num_steps)}
    row_lags = [looker.closed_at[step] - last_sent[step] for step in range(num_steps) if step in looker.closed_at]
    messages = sum(each["messages"] for each in crowds)
    counts = sum((Counter(each["counts"]) for each in crowds), Counter[str]())
    seconds, cpu = said["seconds"], said["worker_cpu_seconds"]
    memory = _memory(looker.resident, said["begin_at"], seconds)
    return {
        "seconds": seconds,
        "messages": messages,
        "messages_per_second": messages / seconds,
        "bytes_per_second": counts["bytes"] / seconds,
        "resent": counts["resent"],
        "reconnections": counts["reconnections"],
        "unacked_at_end": sum(each["unacked"] for each in crowds),
        "steps_closed": dict(looker.reasons),
        "lag_p99_seconds": max(percentile(ack_lags, 0.99), percentile(row_lags, 0.99)),
        "ack_lag_p50_seconds": percentile(ack_lags, 0.5),
        "ack_lag_p99_seconds": percentile(ack_lags, 0.99),
        "ack_lag_max_seconds": max(ack_lags, default=float("nan")),
        "row_lag_p50_seconds": percentile(row_lags, 0.5),
        "row_lag_p99_seconds": percentile(row_lags, 0.99),
        "row_lag_max_seconds": max(row_lags, default=float("nan")),
        "row_lags_seconds": [round(lag, 3) for lag in row_lags],
        "worker_cpu_share": cpu / seconds,
        "worker_cpu_us_per_message": 1e6 * cpu / messages,
        "worker_threads_cpu_share": {
            name: taken / seconds for name, taken in sorted(said["worker_threads_cpu_seconds"].items())
        },
        "wandb_cpu_share": said["wandb_cpu_seconds"] / seconds,
        "ranks_cpu_share": sum(each["cpu_seconds"] for each in crowds) / seconds,
        "late_p99_seconds": percentile(late_by, 0.99),
        **memory,
    }


def _memory(resident: Sequence[tuple[float, int]], begin_at: float, seconds: float) -> dict[str, Any]:
    """The growth is from the most of the first tenth to the most of the rest; never below 0."""
    tenth = begin_at + seconds / 10
    first = [each for at, each in resident if at <= tenth] or [resident[0][1]]
    rest = [each for at, each in resident if at > tenth] or first
    return {
        "memory_start_bytes": resident[0][1],
        "memory_end_bytes": resident[-1][1],
        "memory_growth_bytes": max(0, max(rest) - max(first)),
        "memory_mib": [round(each / (1 << 20), 1) for _, each in resident[:: max(1, len(resident) // 20)]],
    }


def _health(journal: Path) -> dict[str, Any]:
    from sidestep.worker.health import ask_health  # noqa: PLC0415

    said = ask_health(journal)
    run: Mapping[str, Any] = next(iter(said.get("runs", {}).values()), {})
    return {
        "healthy": said.get("healthy", False),
        "reason": said.get("reason", ""),
        "warnings": said.get("warnings", []),
        "receiver": said.get("receiver", {}),
        "closed_step": run.get("closed_step"),
        "unprojected": run.get("unprojected"),
        "late_parts": run.get("late_parts"),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies; NaN for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures for people."""
    names = (
        "ranks", "messages a second", "MB a second", "worker, of a core", "CPU us a message", "ack lag p50 / p99 s",
        "row lag p50 / p99 s", "worker's memory MiB, growth", "its open files", "ranks late p99 s",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        memory = f"{row['memory_end_bytes'] / (1 << 20):.0f}, {row['memory_growth_bytes'] / (1 << 20):+.1f}"
        lines.append(
            f"| {row['ranks']:,} | {row['messages_per_second']:,.0f} | {row['bytes_per_second'] / 1e6:.1f} | "
            f"{row['worker_cpu_share']:.2f} | {row['worker_cpu_us_per_message']:.0f} | "
            f"{row['ack_lag_p50_seconds']:.2f} / {row['ack_lag_p99_seconds']:.2f} | "
            f"{row['row_lag_p50_seconds']:.2f} / {row['row_lag_p99_seconds']:.2f} | {memory} | "
            f"{row['worker_descriptors']:,} | {row['late_p99_seconds']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1_024, metavar="N", help="simulated ranks (%(default)s)")
    parser.add_argument("--seconds", type=int, metavar="S", help="steps, one a second (60)")
    parser.add_argument("--quick", action="store_true", help="12 seconds instead of 60")
    parser.add_argument(
        "--spread", type=float, default=SPREAD_SECONDS, metavar="S",
        help="seconds over which the ranks hand a step over (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.ranks < 1 or (options.seconds is not None and options.seconds < 1):
        parser.error("at least one rank and one second")
    if not 0 <= options.spread < INTERVAL_SECONDS:
        parser.error("the ranks hand a step over before the next one ends")
    from benchmarks.turns import machine  # noqa: PLC0415  # found once the path is set

    on = dict(machine())
    figures = measure(options.ranks, options.seconds or (12 if options.quick else 60), spread_seconds=options.spread)
    print(table([figures]))
    if options.json is not None:
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        result = {"command": " ".join(["python", *sys.argv]), "date": date, **on, **figures}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
