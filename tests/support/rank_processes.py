"""Ranks of a gloo group as processes of their own, which may hang: what they say then, and the end of all of them.

On a busy machine a gloo group hangs now and then, without any hooks too. Such a hang is tried once more, and only where
the hung ranks' own dumps show no frame of ours on the thread that trains.
"""

from __future__ import annotations

import faulthandler
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MARK = "SIDESTEP_TEST_TREE"
_OURS = "trainer_hooks"
_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT = 10_000

Commands = Callable[[int], Sequence[Sequence[str]]]
"""From the number of the attempt, 0 or 1, to the commands that run side by side."""


def say_where_it_hangs(after_seconds: float, grace_seconds: float = 5.0) -> None:
    """In a rank: dump every thread's frames after so long, and end soon after that, when the others have dumped too."""
    faulthandler.dump_traceback_later(after_seconds)
    timer = threading.Timer(after_seconds + grace_seconds, os._exit, (3,))
    timer.daemon = True
    timer.start()


def free_port() -> int:
    """A port to be listened on soon, by another process. (Ranks meet at one: torch's own FileStore hangs now and then.)

    It is below those that the kernel gives to whoever connects, which could take it in between, and drawn from where no
    two tests draw alike.
    """
    first_given = int(_GIVEN_PORTS.read_text(encoding="ascii").split()[0])
    while True:
        port = random.SystemRandom().randrange(_FIRST_PORT, first_given) if first_given > 2 * _FIRST_PORT else 0
        with socket.socket() as probe, suppress(OSError):  # else it is taken: draw again
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How processes ended."""

    codes: tuple[int | None, ...]
    """Exit codes; None: it was still running when time was up."""
    said: str
    """Their stdout and stderr."""

    @property
    def is_clean(self) -> bool:
        """Whether all of them ended well."""
        return all(code == 0 for code in self.codes)

    @property
    def hung_outside_of_the_hooks(self) -> bool:
        """Whether a rank hung, and said where, and no rank's training thread was in the hooks."""
        stacks = training_stacks(self.said)
        return not self.is_clean and bool(stacks) and not any(_OURS in stack for stack in stacks)


def training_stacks(said: str) -> list[str]:
    """The frames of each dump's first thread, the one that trains; ``faulthandler`` writes the newest thread first."""
    dumps = re.split(r"^.*Timeout \(\d+:\d+:\d+.*\)!$", said, flags=re.MULTILINE)[1:]
    found = []
    for dump in dumps:
        threads = re.split(r"^.*Thread 0x[0-9a-f]+.*\(most recent call first\):$", dump, flags=re.MULTILINE)[1:]
        frames = [re.findall(r'File "([^"]*)", line (\d+) in (\S+)', thread) for thread in threads]
        if frames:
            found.append("\n".join(":".join(frame) for frame in frames[-1]))
    return found


def run_once(
    commands: Sequence[Sequence[str]], *, timeout_seconds: float, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run commands side by side to their end, or to the end of time: then they and all that they started are killed."""
    mark = uuid.uuid4().hex
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {_MARK: mark, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryFile() as output:  # a pipe would be waited for as long as any grandchild lives
        started = [
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **own, **(environment or {})},
            )
            for command in commands
        ]  # fmt: skip
        try:
            for process in started:
                with suppress(subprocess.TimeoutExpired):  # its code stays None, which says so
                    process.wait(max(0.0, deadline - time.monotonic()))
            codes = tuple(process.returncode for process in started)
        finally:
            kill_tree(mark)
            for process in started:
                process.wait(timeout=30)
        output.seek(0)
        return Ended(codes=codes, said=output.read().decode("utf-8", errors="replace"))


def run_ranks(
    commands: Commands, *, timeout_seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Run ranks to their end, which has to be a good one; return what they said, and the attempt that it was."""
    for attempt in range(2):
        ended = run_once(commands(attempt), timeout_seconds=timeout_seconds, environment=environment)
        if ended.is_clean or not ended.hung_outside_of_the_hooks:
            break
    assert ended.is_clean, f"exit codes {ended.codes}, attempt {attempt}\n{ended.said[-12_000:]}"
    return ended.said, attempt


def kill_tree(mark: str) -> None:
    """Kill every process that was started with the mark: sessions of their own and orphans included."""
    wanted = f"{_MARK}={mark}".encode()
    for _ in range(5):
        found = [
            pid
            for pid in [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
            if _has_mark(pid, wanted)
        ]
        for pid in found:
            with suppress(ProcessLookupError):  # it ended by itself in between
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.05)


def _has_mark(pid: int, wanted: bytes) -> bool:
    try:
        return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is somebody else's
        return False
