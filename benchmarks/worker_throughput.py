"""How many small messages a second one worker takes in on one core, and whether its memory stays flat.

    python benchmarks/worker_throughput.py [--quick] [--json FILE]

Every rank of a synthetic trainer says two small messages a step: ``LearningRates`` of two groups and ``StepEnd`` (some
200 bytes each on the wire). They are encoded once by the real encoder; step and sequence number are written into the
bytes, so that the sender is not the limit. It runs on a core of its own, through one real socket a rank. The worker is
bound to ONE other core and does all that it does for a trainer: it reads, checks and decodes every message, commits
with ``synchronous=FULL``, acks, and (``worker``) assembles, projects and writes the outbox. ``intake`` is the same
receiver and journal without the assembler behind them.

Reported: messages a second of wall time until the last ack, and until the last step is closed; CPU of the worker's
process per message; and by how much its resident memory grew after the first tenth of the messages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.frames import Envelope, decode, encode
from sidestep.protocol.messages import Ack, Blob, Hello, LearningRates, Message, StepEnd, Welcome
from sidestep.protocol.tables import digest, encode_table
from sidestep.worker.garbage import collect_seldom
from sidestep.worker.health import ask_health
from sidestep.worker.intake.feed import Feed
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.receiver import Receiver
from sidestep.worker.intake.reception import Reception

MESSAGES_PER_STEP_AND_RANK = 2
WINDOW_MESSAGES = 50_000
"""Messages that the sender leaves unacked, over all ranks."""
NUM_SAMPLES = 10
"""Times at which the worker's memory is read, evenly over the messages."""
MODES = ("worker", "intake")
_STEP_MARK, _SEQUENCE_MARK = 0x7EADBEE1, 0x7EADBEE2
_GROUPS = encode_table({"names": ["vision_encoder", "language_model"]})


class Template:
    """One encoded message, and where its step and sequence number stand in it."""

    def __init__(self, rank: int, message: Message) -> None:
        """Encode ``message``, whose step is ``_STEP_MARK``."""
        accounts = {"learning_rates": (1_000_000, 0, 0), "step_end": (1_000_000, 0, 0)}
        envelope = Envelope(
            run_id="bench", incarnation="bench-1", rank=rank, sequence=_SEQUENCE_MARK, accounts=accounts
        )
        self._frame = encode(envelope, message)
        self._step_at = self._frame.index(struct.pack(">I", _STEP_MARK))
        self._sequence_at = self._frame.index(struct.pack(">I", _SEQUENCE_MARK))

    def frame(self, step: int, sequence: int) -> bytes:
        """Return the frame of this step under this number."""
        made = bytearray(self._frame)
        struct.pack_into(">I", made, self._step_at, step)
        struct.pack_into(">I", made, self._sequence_at, sequence)
        return bytes(made)


class Rank:
    """One rank's socket and stream."""

    def __init__(self, context: zmq.Context[Any], address: str, rank: int, num_ranks: int) -> None:
        """Connect, say Hello, and give the tables that are asked for."""
        self.acked = 0
        self.sequence = 0
        self._templates = (
            Template(rank, LearningRates(step=_STEP_MARK, rates=np.array([3e-4, 1e-3]))),
            Template(
                rank, StepEnd(step=_STEP_MARK, unix_time=1_700_000_000.5, sent={"learning_rates": 1}, due=("lr",))
            ),
        )
        self.socket = context.socket(zmq.DEALER)
        self.socket.connect(address)
        envelope = Envelope(run_id="bench", incarnation="bench-1", rank=rank)
        place = {"host": platform.node(), "pid": os.getpid()}
        hello = Hello(world_size=num_ranks, topology=place, tables={"groups": digest(_GROUPS)})
        self.socket.send(encode(envelope, hello))
        welcome = decode(self.socket.recv())[1]
        if isinstance(welcome, Welcome) and welcome.wanted:
            self.socket.send(encode(envelope, Blob(digest=digest(_GROUPS), content=_GROUPS)))

    def send_step(self, step: int) -> None:
        """Send a step's messages."""
        for template in self._templates:
            self.sequence += 1
            self.socket.send(template.frame(step, self.sequence))

    def hear(self) -> None:
        """Take what the worker says."""
        while self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            message = decode(self.socket.recv())[1]
            if isinstance(message, Ack) and len(message.committed):
                self.acked = int(message.committed[-1, 1])


def publish(address: str, num_steps: int, num_ranks: int, core: int, pipe: Connection) -> None:
    """Send everything and wait for the last ack; tell ``pipe`` how far it is, and the time of the first and last."""
    os.sched_setaffinity(0, {core})
    context = zmq.Context()
    ranks = [Rank(context, address, rank, num_ranks) for rank in range(num_ranks)]
    total = num_steps * num_ranks * MESSAGES_PER_STEP_AND_RANK
    marks = [total * (at + 1) // NUM_SAMPLES for at in range(NUM_SAMPLES)]
    sent = acked = 0
    pipe.send(("begin", time.monotonic()))
    for step in range(num_steps):
        for rank in ranks:
            rank.send_step(step)
        sent += num_ranks * MESSAGES_PER_STEP_AND_RANK
        while sent - acked > WINDOW_MESSAGES or (step == num_steps - 1 and acked < total):
            for rank in ranks:
                rank.hear()
            acked = sum(rank.acked for rank in ranks)
            time.sleep(0.001)
        while marks and sent >= marks[0]:
            pipe.send(("sent", marks.pop(0)))
    pipe.send(("end", time.monotonic()))
    pipe.recv()
    for rank in ranks:
        rank.socket.close(0)
    context.term()


def serve_intake(folder: Path, address: str) -> None:
    """Be a worker without what comes behind the journal; until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    journal = Journal(folder)
    feed = Feed(journal.segments, limit_bytes=0, start_arrival=0)  # nobody takes: nothing is kept in memory
    reception = Reception(journal, feed, instance="bench", commit_interval_seconds=0.02, commit_messages=1_000)
    receiver = Receiver(Endpoint.parse(address), reception)
    collect_seldom()
    receiver.start()
    ended.wait()
    receiver.stop()
    journal.close()


@contextmanager
def serving(mode: str, folder: Path, core: int) -> Iterator[tuple[int, str]]:
    """Start a worker, or its intake alone, on ``core``; yield its process id and address."""
    address = f"ipc://{folder}/socket"
    journal = folder / "journal"
    command = [sys.executable, "-m", "sidestep.worker.cli", "worker", "--endpoint", address, "--out", str(folder)]
    command += ["--wandb-mode", "disabled"]
    if mode == "intake":
        command = [sys.executable, __file__, "--serve-intake", str(journal), address]
    environment = {**os.environ, "SIDESTEP_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        os.sched_setaffinity(process.pid, {core})
        wait_for((folder / "socket").exists, "the worker does not listen")
        yield process.pid, address
    finally:
        process.terminate()
        process.wait(60)


def wait_for(is_so: Callable[[], bool], otherwise: str, timeout_seconds: float = 120.0) -> None:
    """Return when ``is_so``; raise TimeoutError after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.02)


def cpu_seconds(pid: int) -> float:
    """Return user and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def closed_steps(journal: Path) -> int:
    """Return how many steps the worker has closed."""
    runs: Mapping[str, Mapping[str, int]] = ask_health(journal).get("runs", {})
    return sum(run.get("closed_complete", 0) for run in runs.values())


def measure(num_messages: int, *, mode: str = "worker", num_ranks: int = 16, cores: tuple[int, int]) -> dict[str, Any]:
    """Send ``num_messages`` (rounded down to whole steps) to a worker on the first core from the second one.

    Args:
        num_messages: over all ranks.
        mode: ``worker``, or ``intake`` for the receiver and the journal alone.
        num_ranks: ranks of the synthetic trainer, one connection each.
        cores: for the worker, and for the sender.

    Raises:
        TimeoutError: the worker did not take everything in.
    """
    num_steps = max(1, num_messages // (num_ranks * MESSAGES_PER_STEP_AND_RANK))
    num_messages = num_steps * num_ranks * MESSAGES_PER_STEP_AND_RANK
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ss-bench-") as name, serving(mode, Path(name), cores[0]) as (pid, address):
        pipe, theirs = context.Pipe()
        sender = context.Process(target=publish, args=(address, num_steps, num_ranks, cores[1], theirs))
        sender.start()
        _, began = pipe.recv()
        cpu_before = cpu_seconds(pid)
        memory: list[float] = []
        while (said := pipe.recv())[0] == "sent":
            memory.append(resident_mib(pid))
        acked_seconds = closed_seconds = said[1] - began
        if mode == "worker":
            wait_for(lambda: closed_steps(Path(name) / "journal") >= num_steps, "steps stay open")
            closed_seconds = time.monotonic() - began
        cpu = cpu_seconds(pid) - cpu_before
        memory.append(resident_mib(pid))
        pipe.send("done")
        sender.join(30)
    return {
        "mode": mode,
        "messages": num_messages,
        "ranks": num_ranks,
        "steps": num_steps,
        "messages_per_second": num_messages / closed_seconds,
        "acked_per_second": num_messages / acked_seconds,
        "cpu_us_per_message": 1e6 * cpu / num_messages,
        "messages_per_cpu_second": num_messages / cpu,
        "resident_mib": [round(each, 1) for each in memory],
        "growth_after_first_tenth_mib": round(max(memory[1:]) - memory[0], 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures for people."""
    lines = [
        "| part | messages | until acked, a second | until closed, a second | CPU us each | resident MiB, growth |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['mode']} | {row['messages']:,} | {row['acked_per_second']:,.0f} | "
        f"{row['messages_per_second']:,.0f} | {row['cpu_us_per_message']:.1f} | "
        f"{row['resident_mib'][-1]:.0f}, {row['growth_after_first_tenth_mib']:+.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 messages instead of a million")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--messages", type=int, metavar="N", help="so many messages instead")
    parser.add_argument("--ranks", type=int, default=16, help="ranks of the synthetic trainer (%(default)s)")
    parser.add_argument("--mode", choices=MODES, action="append", help="this part only")
    parser.add_argument("--serve-intake", nargs=2, metavar=("JOURNAL", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_intake:
        serve_intake(Path(options.serve_intake[0]), options.serve_intake[1])
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("two cores are needed: one for the worker, one for the sender")
    num_messages = options.messages or (100_000 if options.quick else 1_000_000)
    rows = [
        measure(num_messages, mode=mode, num_ranks=options.ranks, cores=(cores[0], cores[1]))
        for mode in options.mode or MODES
    ]
    print(table(rows))
    if options.json is not None:
        found = {row["mode"]: row for row in rows}
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "small_message": "LearningRates of 2 groups and StepEnd, by turns",
            "worker_messages_per_second": found.get("worker", rows[0])["messages_per_second"],
            "intake_messages_per_second": found.get("intake", rows[0])["messages_per_second"],
            **found,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
