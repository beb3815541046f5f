"""Faults on purpose: a plan of what fails, stalls, is dropped or delayed, at which rank and step, and what has struck.

The plan is data, so that a test hands it to a process that it starts (``SIDESTEP_FAULTS``). Whoever has a point where a
fault may strike asks ``Faults`` there, and only where a plan was given: without one no code of this module runs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

FAULTS_VARIABLE = "SIDESTEP_FAULTS"
"""Environment variable with a plan as ``Faults.to_json`` writes it."""


class InjectedFaultError(Exception):
    """What a fault of the kind ``fail`` raises; nothing else does."""


class Action(StrEnum):
    """What a fault does; what that means at a point is said where the point is."""

    FAIL = "fail"
    STALL = "stall"
    DROP = "drop"
    DELAY = "delay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong, the first ``times`` times that its point is passed by what it names."""

    action: Action
    where: str
    """The point, ``SIDE.NAME``: ``trainer.send``, ``worker.commit``."""
    rank: int | None = None
    """Only there; None: at any rank."""
    step: int | None = None
    """Not before this step; None: from the beginning."""
    kind: str = ""
    """Only this kind of message, by its name in lower case; empty: any."""
    seconds: float = 0.0
    """How long a stall or a delay lasts."""
    times: int = 1
    """How often it strikes; 0: every time."""

    def __post_init__(self) -> None:
        """Raise ValueError for what could never strike, or would wait for no time; the text names the field."""
        object.__setattr__(self, "action", Action(self.action))
        where: object = self.where  # read from JSON: whatever stood there
        if not isinstance(where, str) or "." not in where:
            raise ValueError(f"Fault.where is {self.where!r}; it must be SIDE.NAME")
        for name in ("rank", "step", "times"):
            value = getattr(self, name)
            if (value is None and name != "times") or (type(value) is int and value >= 0):
                continue
            raise ValueError(f"Fault.{name} is {value!r}; it must be a whole number of at least 0")
        lasts = self.action in {Action.STALL, Action.DELAY}
        seconds: object = self.seconds
        if not isinstance(seconds, int | float) or lasts != (0 < seconds < float("inf")):
            raise ValueError(f"Fault.seconds is {self.seconds!r}; stalls and delays last a time, fail and drop none")

    def names(self, where: str, rank: int, step: int, kind: str) -> bool:
        """Return whether this is about what passes the point ``where``."""
        return (
            self.where == where
            and self.rank in {None, rank}
            and (self.step is None or step >= self.step)
            and self.kind in {"", kind}
        )


class Faults:
    """A plan, and how often each kind of fault has struck. Any thread may ask."""

    def __init__(self, plan: Iterable[Fault] = (), *, record: Path | None = None) -> None:
        """Begin with ``plan``; each strike is appended to ``record`` as one line of JSON, for whoever outlives us."""
        self._plan = list(plan)
        self._left = [fault.times or -1 for fault in self._plan]
        self._record = record
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    # --------------------------------------------------------------------------------------------- the plan

    def fail_at(
        self, where: str, *, rank: int | None = None, step: int | None = None, kind: str = "", times: int = 1
    ) -> Self:
        """Raise ``InjectedFaultError`` there."""
        return self._add(Fault(action=Action.FAIL, where=where, rank=rank, step=step, kind=kind, times=times))

    def drop_at(
        self, where: str, *, rank: int | None = None, step: int | None = None, kind: str = "", times: int = 1
    ) -> Self:
        """Lose what passes there."""
        return self._add(Fault(action=Action.DROP, where=where, rank=rank, step=step, kind=kind, times=times))

    def stall_at(
        self,
        where: str,
        *,
        seconds: float,
        rank: int | None = None,
        step: int | None = None,
        kind: str = "",
        times: int = 1,
    ) -> Self:
        """Let nothing pass there for ``seconds``."""
        return self._add(
            Fault(action=Action.STALL, where=where, rank=rank, step=step, kind=kind, times=times, seconds=seconds)
        )

    def delay_at(
        self,
        where: str,
        *,
        seconds: float,
        rank: int | None = None,
        step: int | None = None,
        kind: str = "",
        times: int = 1,
    ) -> Self:
        """Let what passes there arrive ``seconds`` later."""
        return self._add(
            Fault(action=Action.DELAY, where=where, rank=rank, step=step, kind=kind, times=times, seconds=seconds)
        )

    def _add(self, fault: Fault) -> Self:
        with self._lock:
            self._plan.append(fault)
            self._left.append(fault.times or -1)
        return self

    def check_points(self, side: str, names: Iterable[str]) -> None:
        """Hold the plan's points of one side against those that there are.

        Raises:
            ValueError: the plan names a point of ``side`` that is not among ``names``.
        """
        known = set(names)
        unknown = {fault.where for fault in self._plan if fault.where.startswith(f"{side}.")} - known
        if unknown:
            raise ValueError(f"no such point: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")

    # --------------------------------------------------------------------------------------------- the points

    def strike(self, where: str, *, rank: int = 0, step: int = -1, kind: str = "") -> Fault | None:
        """Return the fault that strikes what passes ``where`` now, counted; None: it passes unharmed."""
        with self._lock:
            for at, fault in enumerate(self._plan):
                if self._left[at] and fault.names(where, rank, step, kind):
                    self._left[at] -= self._left[at] > 0
                    self._counts[f"{fault.action} {where}"] += 1
                    self._write_down(fault, rank, step, kind)
                    return fault
        return None

    def act(self, where: str, *, rank: int = 0, step: int = -1, kind: str = "") -> bool:
        """Do there what the plan says: wait for a stall or a delay; return whether what passes is to be dropped.

        Raises:
            InjectedFaultError: it is to fail.
        """
        fault = self.strike(where, rank=rank, step=step, kind=kind)
        if fault is None:
            return False
        if fault.action is Action.FAIL:
            raise InjectedFaultError(f"{where} fails on purpose")
        time.sleep(fault.seconds)
        return fault.action is Action.DROP

    def counts(self) -> dict[str, int]:
        """Return ``"ACTION POINT"`` to how often it has struck; what never struck is not there."""
        with self._lock:
            return dict(self._counts)

    def _write_down(self, fault: Fault, rank: int, step: int, kind: str) -> None:
        if self._record is None:
            return
        line = json.dumps({"action": fault.action, "where": fault.where, "rank": rank, "step": step, "kind": kind})
        with self._record.open("a", encoding="utf-8") as record:
            record.write(f"{line}\n")

    # --------------------------------------------------------------------------------------------- as text

    def to_json(self) -> str:
        """Return the plan as ``SIDESTEP_FAULTS`` holds it; what has struck is not part of it."""
        record = {} if self._record is None else {"record": str(self._record)}
        return json.dumps({"faults": [asdict(fault) for fault in self._plan], **record})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the plan that ``to_json`` wrote.

        Raises:
            ValueError: it is no plan; the text says where.
        """
        document = json.loads(text)
        if not isinstance(document, dict) or not isinstance(document.get("faults"), list):
            raise ValueError('a plan of faults is {"faults": [...]}')
        record = document.get("record")
        return cls(map(_read_fault, document["faults"]), record=None if record is None else Path(record))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self | None:
        """Return the plan in ``SIDESTEP_FAULTS``; None without one.

        Raises:
            ValueError: it is no plan.
        """
        text = (os.environ if environment is None else environment).get(FAULTS_VARIABLE, "")
        return cls.from_json(text) if text else None


def recorded_counts(record: Path) -> dict[str, int]:
    """Return ``counts`` of all processes that wrote to ``record``, the ended ones included; empty where none has."""
    if not record.exists():
        return {}
    struck = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return dict(Counter(f"{entry['action']} {entry['where']}" for entry in struck))


def _read_fault(entry: Any) -> Fault:
    if not isinstance(entry, dict) or {"action", "where"} - set(entry):
        raise ValueError(f"a fault needs an action and where it strikes: {entry!r}")
    unknown = set(entry) - {field.name for field in fields(Fault)}
    if unknown:
        raise ValueError(f"a fault has no {', '.join(sorted(unknown))}")
    return Fault(**entry)
