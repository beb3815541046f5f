"""What the ranks of each run have said of themselves since this worker began: for its health, never for a run's rows.

A run's rows come from recorded closings alone (``run_accounts.py``); here is what has arrived, closed or not.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sidestep.protocol.messages import StepEnd
from sidestep.worker.intake.assembly import Journaled
from sidestep.worker.run_accounts import MAX_COUNT, known_kind

MAX_SHOWN_RANKS: Final = 64
"""Ranks that are shown one by one; of more, the first and the last alone."""


@dataclass(slots=True)
class _Rank:
    sequence: int = 0
    accounts: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    resent: int = 0
    last_step: int = -1


@dataclass(slots=True)
class _Run:
    incarnation: str
    ranks: dict[int, _Rank] = field(default_factory=dict)
    before: set[str] = field(default_factory=set)
    earlier: Counter[str] = field(default_factory=Counter)

    def begin(self, incarnation: str) -> None:
        self.earlier += self.counts()
        self.before.add(self.incarnation)
        self.incarnation = incarnation
        self.ranks = {}

    def counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for rank in list(self.ranks.values()):
            counts["resent"] += min(rank.resent, MAX_COUNT)
            for kind, account in rank.accounts.items():
                for name, count in zip(("produced", "dropped", "refused"), account, strict=True):
                    counts[f"{name}/{known_kind(kind)}"] += min(count, MAX_COUNT)
        return counts


class HeardRuns:
    """The newest word of every rank. One thread calls ``take``, any thread ``report``."""

    def __init__(self) -> None:
        """Begin with nobody heard."""
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()  # a scrape between two attempts must not see a counter fall

    def newest_step(self, run_id: str) -> int:
        """Return the newest step that any rank of the run has ended, -1 for none."""
        run = self._runs.get(run_id)
        return -1 if run is None else max((rank.last_step for rank in run.ranks.values()), default=-1)

    def take(self, each: Journaled) -> None:
        """Note a message that has been journaled."""
        envelope = each.envelope
        run = self._runs.get(envelope.run_id)
        if run is None:
            run = self._runs[envelope.run_id] = _Run(envelope.incarnation)
        if envelope.incarnation != run.incarnation:
            if envelope.incarnation in run.before:
                return
            with self._lock:
                run.begin(envelope.incarnation)
        rank = run.ranks.get(envelope.rank)
        if rank is None:
            rank = run.ranks[envelope.rank] = _Rank()
        if envelope.sequence > rank.sequence:
            rank.sequence = envelope.sequence
            if envelope.accounts:
                rank.accounts, rank.resent = envelope.accounts, envelope.resent
        if isinstance(each.message, StepEnd):
            rank.last_step = max(rank.last_step, each.message.step)

    def report(self, run_id: str) -> dict[str, Any]:
        """Return a run's ranks and their last steps, and its messages per kind; counters only ever grow.

        ``last_steps`` is empty beyond ``MAX_SHOWN_RANKS`` ranks.
        """
        run = self._runs.get(run_id)
        if run is None:
            return {
                "ranks_heard": 0,
                "newest_step": -1,
                "slowest_step": -1,
                "last_steps": {},
                "messages": {},
                "resent": 0,
            }
        with self._lock:
            ranks, counts = sorted(run.ranks.items()), run.earlier + run.counts()
        steps = {rank: said.last_step for rank, said in ranks if said.last_step >= 0}
        messages: dict[str, dict[str, int]] = {}
        for name, count in sorted(counts.items()):
            what, _, kind = name.partition("/")
            if kind:
                messages.setdefault(kind, dict.fromkeys(("produced", "dropped", "refused"), 0))[what] = count
        return {
            "ranks_heard": len(ranks),
            "newest_step": max(steps.values(), default=-1),
            "slowest_step": min(steps.values(), default=-1),
            "last_steps": {str(rank): step for rank, step in steps.items()} if len(ranks) <= MAX_SHOWN_RANKS else {},
            "messages": messages,
            "resent": counts["resent"],
        }
