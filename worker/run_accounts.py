"""What became of a run's messages, as its rows say it (docs/delivery.md, section 6; docs/sidecar_metrics.md).

A publisher's counters travel in the head of each of its messages, cumulative over its incarnation. Here the newest ones
of every rank are added up, over the ranks and over the run's attempts, and what the closings used is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from sidestep.protocol.messages import Json, Kind
from sidestep.worker.metrics.measurement import Value
from sidestep.worker.records import AssembledStep, RankAccount

MAX_COUNT: Final = 1 << 40
"""More messages than one rank can make: a larger count is not believed."""

UNKNOWN_KIND: Final = "unknown"
"""Stands for kinds that this version does not know."""

_KINDS: Final = frozenset(kind.name.lower() for kind in Kind)


class RunAccounts:
    """One run's accounts, over all its attempts; every counter only ever grows."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self._attempt = -1
        self._ranks: dict[int, dict[str, int]] = {}
        self._totals: Counter[str] = Counter()
        self._told_by_ends: Counter[str] = Counter()
        self._num_messages: int | None = 0
        self._is_counted = True

    def take(self, step: AssembledStep) -> None:
        """Count a closing in."""
        self._is_counted = step.num_messages is not None
        if step.num_messages is None or self._num_messages is None:
            self._num_messages = None
        else:
            self._num_messages += step.num_messages
        if step.attempt > self._attempt:
            self._attempt = step.attempt
            self._ranks = {}
        if step.attempt == self._attempt:
            for rank, account in step.accounts.items():
                self._take_rank(self._ranks.setdefault(rank, {}), account)
        for dropped in [end.dropped for end in step.ends.values() if end.dropped]:
            for kind, count in dropped.items():
                self._told_by_ends[known_kind(kind)] += min(count, MAX_COUNT)

    def _take_rank(self, known: dict[str, int], account: RankAccount) -> None:
        made = lost = 0
        for produced, dropped, refused in account.kinds.values():
            made += produced
            lost += dropped + refused
        said = {"resent": min(account.resent, MAX_COUNT), "produced": made}
        if lost or made > MAX_COUNT:
            _count_one_by_one(account, said)
        for name, count in said.items():
            before = known.get(name, 0)
            if count > before:  # a late part's head is older than what is known
                self._totals[name] += count - before
                known[name] = count

    def figures(self) -> dict[str, Value]:
        """Return what stands in every row: how far the run has come; zeros are zeros, and what nobody said is absent.

        A publisher that sends no accounts leaves ``sidecar/journal_rows`` alone, one of the wire 1.0 nothing.
        """
        found: dict[str, Value] = {}
        if not self._is_counted:
            return found
        if self._num_messages is not None:
            found["sidecar/journal_rows"] = self._num_messages
        if self._totals["produced"]:
            found["sidecar/produced"] = self._totals["produced"]
            found["sidecar/resent"] = self._totals["resent"]
            found["sidecar/refused"] = self._num_refused()
        return found

    def losses(self) -> dict[str, Value]:
        """Return what is worth a row when it changes: drops and refusals per kind, and resends; none that is 0.

        A worker that hears no accounts goes by what the steps' ends say was dropped.
        """
        dropped = {name: count for name, count in self._totals.items() if name.startswith("dropped/") and count}
        for kind, count in self._told_by_ends.items():
            if count:
                dropped[f"dropped/{kind}"] = max(count, dropped.get(f"dropped/{kind}", 0))
        refused = {name: count for name, count in self._totals.items() if name.startswith("refused/") and count}
        others = {"resent": self._totals["resent"], "refused": self._num_refused()} if self._is_counted else {}
        told = {**dropped, **refused, **{name: count for name, count in others.items() if count}}
        return {f"sidecar/{name}": count for name, count in sorted(told.items())}

    def last_words(self) -> dict[str, Value]:
        """Return all that is known at an end without a Goodbye."""
        return {**self.figures(), **self.losses()} if self._is_counted else {}

    def _num_refused(self) -> int:
        return sum(count for name, count in self._totals.items() if name.startswith("refused/"))

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "attempt": self._attempt,
            "ranks": [[rank, dict(sorted(known.items()))] for rank, known in sorted(self._ranks.items())],
            "totals": {name: count for name, count in sorted(self._totals.items()) if count},
            "told_by_ends": {kind: count for kind, count in sorted(self._told_by_ends.items()) if count},
            "messages": self._num_messages,
            "is_counted": self._is_counted,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._attempt = int(state["attempt"])
        self._ranks = {int(rank): {str(name): int(n) for name, n in known.items()} for rank, known in state["ranks"]}
        self._totals = Counter({str(name): int(count) for name, count in state["totals"].items()})
        self._told_by_ends = Counter({str(kind): int(count) for kind, count in state["told_by_ends"].items()})
        self._num_messages = None if state["messages"] is None else int(state["messages"])
        self._is_counted = bool(state["is_counted"])

    def restore_drops(self, dropped: Mapping[str, Any]) -> None:
        """Take over a state of version 1, which knew what the steps' ends say was dropped, and counted no messages."""
        self._num_messages, self._is_counted = None, False
        self._told_by_ends = Counter({known_kind(str(kind)): int(count) for kind, count in dropped.items()})


def _count_one_by_one(account: RankAccount, said: dict[str, int]) -> None:
    said["produced"] = 0
    for kind, (produced, dropped, refused) in account.kinds.items():
        said["produced"] += min(produced, MAX_COUNT)
        for what, count in (("dropped", dropped), ("refused", refused)):
            if count:
                name = f"{what}/{known_kind(kind)}"
                said[name] = said.get(name, 0) + min(count, MAX_COUNT)


def known_kind(kind: str) -> str:
    """Return a kind's name as a key may hold it; what is not known is one kind."""
    return kind if kind in _KINDS else UNKNOWN_KIND
