"""Two hosts on one machine: network namespaces with one cable between them, which can be cut in several ways."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

WORKER, TRAINER = 0, 1
"""The two hosts by what runs there."""
_ADDRESSES: Final = ("10.213.97.1", "10.213.97.2")


def why_not() -> str:
    """Return why there cannot be two hosts here, "" where there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for tool in ("ip", "iptables", "ss"):
        if shutil.which(tool) is None:
            return f"there is no {tool} here"
    name = f"sst-{secrets.token_hex(3)}"
    made = _run("ip", "netns", "add", name, check=False)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    table = _run("ip", "netns", "exec", name, "iptables", "-L", "-n", check=False)
    cable = _run("ip", "-n", name, "link", "add", "sst0", "type", "veth", "peer", "name", "sst1", check=False)
    _run("ip", "netns", "del", name)
    failed = table if table.returncode else cable
    return f"network namespaces are of no use here: {failed.stderr.strip()}" if failed.returncode else ""


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=check)


class TwoHosts:
    """The hosts, while a test lasts; whatever runs in them at its end is killed."""

    def __init__(self) -> None:
        mark = secrets.token_hex(3)
        self._names = (f"ssw-{mark}", f"sst-{mark}")
        self.addresses = _ADDRESSES

    def __enter__(self) -> Self:
        for name in self._names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        ends = [word for name in self._names for word in ("name", "cable", "netns", name)]
        _run("ip", "link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for name, address in zip(self._names, self.addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            _run("ip", "-n", name, "link", "set", "cable", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host, name in enumerate(self._names):
            self.kill_all(host)
            _run("ip", "netns", "del", name, check=False)

    def at(self, host: int) -> list[str]:
        """Return what a command on this host begins with."""
        return ["ip", "netns", "exec", self._names[host]]

    def drop(self, *match: str) -> None:
        """Let packets of the trainers' host vanish, both ways: all, or those that ``match`` says (of what it sends)."""
        self._tables("-I", match)

    def pass_again(self, *match: str) -> None:
        """Undo ``drop``."""
        self._tables("-D", match)

    def _tables(self, what: str, match: Sequence[str]) -> None:
        back = [{"--dport": "--sport", "--sport": "--dport"}.get(word, word) for word in match]
        for chain, place, words in (("OUTPUT", "-o", match), ("INPUT", "-i", back)):
            _run(*self.at(TRAINER), "iptables", "-w", what, chain, place, "cable", *words, "-j", "DROP")

    def link(self, host: int, *, up: bool) -> None:
        """Pull this host's end of the cable, or put it in again."""
        _run("ip", "-n", self._names[host], "link", "set", "cable", "up" if up else "down")

    def connections_to(self, port: int) -> list[int]:
        """Return the trainers' own ports of connections to this port of the worker."""
        said = _run(*self.at(TRAINER), "ss", "-Htn", "state", "established", f"dport = :{port}").stdout
        return [int(line.split()[2].rpartition(":")[2]) for line in said.splitlines()]

    def kill_all(self, host: int) -> None:
        """End every process on this host at once."""
        for _ in range(50):
            found = _run("ip", "netns", "pids", self._names[host], check=False).stdout.split()
            for pid in found:
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(int(pid), signal.SIGKILL)
            if not found:
                return
            time.sleep(0.05)
