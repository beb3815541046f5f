"""One rank of a trainer as a process of its own: the real publisher, told line by line what to hand over.

    python -m tests.support.rank_process ADDRESS RUN_ID INCARNATION RANK WORLD_SIZE START_STEP

Lines on its standard input: ``steps FIRST LAST`` hands over whole steps, ``greeted N`` waits until workers have
welcomed it so often, ``flush`` until the worker has all of it, ``send`` until all is on its way, ``accounts`` tells
what became of all, ``close`` says goodbye and ends. Each is answered by a line. ``RankProcess`` is the other end of
these lines.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from tests.support.wire_trainer import CONTENTS, make_hello, step_messages

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.frames import Envelope
from sidestep.protocol.keys import client_keys
from sidestep.protocol.limits import WINDOW_BYTES
from sidestep.trainer_hooks.publisher import Publisher

_CLOSE_SECONDS = 30.0
_POLL_SECONDS = 0.01
_ON_THE_WIRE_SECONDS = 1.0
"""After which the socket has handed its messages to the kernel, where they outlive the process."""


class RankProcess:
    """The process, from the test's side."""

    def __init__(
        self,
        address: str,
        *,
        incarnation: str = "inc-1",
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        run_id: str = "run-1",
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it, behind ``prefix`` (``ip netns exec NAME``)."""
        places = [address, run_id, incarnation, str(rank), str(world_size), str(start_step)]
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.support.rank_process", *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def ask(self, line: str) -> str:
        """Say a line and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the rank ended before it answered {line!r}"
        return answer.strip()

    def steps(self, first: int, last: int) -> None:
        """Hand over steps ``first`` to ``last - 1``."""
        self.ask(f"steps {first} {last}")

    def greeted(self, num_welcomes: int = 1) -> None:
        """Return when workers have welcomed it so often: what it is told to hand over leaves at once."""
        self.ask(f"greeted {num_welcomes}")

    def flush(self) -> None:
        """Return when the worker has acked all."""
        self.ask("flush")

    def send(self) -> None:
        """Return when all is in the kernel's hands, whether or not the worker reads."""
        self.ask("send")

    def accounts(self) -> dict[str, int]:
        """Return what became of all that it was told to hand over so far, how many were sent again, and welcomes."""
        found: dict[str, int] = json.loads(self.ask("accounts"))
        return found

    def close(self) -> None:
        """Say goodbye and end."""
        self.ask("close")
        assert self._process.wait(_CLOSE_SECONDS) == 0

    def kill(self) -> None:
        """SIGKILL it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()


class _Rank:
    """The process, from its own side."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._num_submitted = 0

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for message in step_messages(step):
                self._publisher.submit(message)
                self._num_submitted += 1

    def greeted(self, num_welcomes: int) -> None:
        while self._publisher.statistics().num_welcomes < num_welcomes:
            time.sleep(_POLL_SECONDS)

    def flush(self) -> None:
        while sum(each.accepted for each in self._publisher.accounts().values()) < self._num_submitted:
            time.sleep(_POLL_SECONDS)

    def send(self) -> None:
        while self._num_taken() < self._num_submitted or self._publisher.statistics().num_unsent:
            time.sleep(_POLL_SECONDS)
        time.sleep(_ON_THE_WIRE_SECONDS)

    def _wait_for_a_tick(self) -> None:
        """Return when the publisher's figures, which are those of its last tick, tell of all that was handed over."""
        while self._publisher._submissions:
            time.sleep(_POLL_SECONDS)
        seen = self._publisher.statistics().num_ticks
        while self._publisher.statistics().num_ticks == seen:
            time.sleep(_POLL_SECONDS)

    def _num_taken(self) -> int:
        return sum(each.produced for each in self._publisher.accounts().values())

    def accounts(self) -> str:
        self._wait_for_a_tick()
        accounts = list(self._publisher.accounts().values())
        names = ("produced", "accepted", "refused", "dropped", "in_window")
        found = {name: sum(getattr(account, name) for account in accounts) for name in names}
        statistics = self._publisher.statistics()
        return json.dumps({**found, "resent": statistics.num_resends, "welcomes": statistics.num_welcomes})

    def close(self) -> None:
        self._publisher.close(_CLOSE_SECONDS)


def main() -> None:
    """Do as the lines say."""
    address, run_id, incarnation, rank, world_size, start_step = sys.argv[1:]
    identity = Envelope(run_id=run_id, incarnation=incarnation, rank=int(rank))
    hello = make_hello(
        world_size=int(world_size),
        start_step=int(start_step),
        topology={"host": socket.gethostname(), "pid": os.getpid()},
    )
    keys = client_keys(Endpoint.parse(address), os.environ)
    window_bytes = int(os.environ.get("RANK_WINDOW_BYTES", WINDOW_BYTES))
    publisher = Publisher(address, identity, hello, blobs=CONTENTS, window_bytes=window_bytes, keys=keys)
    made = _Rank(publisher.start())
    commands: Mapping[str, Callable[..., str | None]] = {
        "accounts": made.accounts,
        "steps": made.steps,
        "greeted": made.greeted,
        "flush": made.flush,
        "send": made.send,
        "close": made.close,
    }
    for line in sys.stdin:
        command, *numbers = line.split()
        answer = commands[command](*map(int, numbers))
        sys.stdout.write(f"{answer or 'done'}\n")
        sys.stdout.flush()
        if command == "close":
            return


if __name__ == "__main__":
    main()
