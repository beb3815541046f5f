"""A run's outbox as series by key, tables, alerts and notices: what the report draws from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sidestep.worker.outbox import StoredEntry

STEP_KEY = "train/step"
ATTEMPT_KEY = "train/attempt"


@dataclass(slots=True)
class Series:
    """The values of one key, in the order they were written."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)

    @property
    def newest(self) -> float:
        """The value written last; a series has at least one."""
        return self.values[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRecord:
    """One table of one step."""

    step: int
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(slots=True, kw_only=True)
class RunHistory:
    """All that a run's outbox says."""

    run: dict[str, Any] = field(default_factory=dict)
    finish: dict[str, Any] | None = None
    series: dict[str, Series] = field(default_factory=dict)
    """Key to its numbers."""
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Key to (step, text)."""
    histograms: dict[str, list[tuple[int, list[float], list[float]]]] = field(default_factory=dict)
    """Key to (step, counts, edges)."""
    tables: dict[str, list[TableRecord]] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    notices: list[dict[str, Any]] = field(default_factory=list)
    num_rows: int = 0
    newest_step: int = -1
    attempts: int = 0
    first_time: float | None = None
    last_time: float | None = None

    def newest(self, key: str) -> float | None:
        """Return the value of ``key`` written last, or None."""
        return self.series[key].newest if key in self.series else None

    def newest_text(self, key: str) -> str | None:
        """Return the text of ``key`` written last, or None."""
        return self.texts[key][-1][1] if key in self.texts else None


def read_history(entries: Iterable[StoredEntry]) -> RunHistory:
    """Return what ``entries`` of one run say, in their order; kinds that are not known are passed over."""
    history = RunHistory()
    for entry in entries:
        payload = entry.value()
        match entry.kind:
            case "run":
                history.run = payload
            case "row":
                _take_row(history, payload)
            case "table":
                _take_table(history, payload)
            case "alert":
                history.alerts.append(payload)
            case "notice":
                history.notices.append(payload)
            case "finish":
                history.finish = payload
    return history


def _take_row(history: RunHistory, payload: dict[str, Any]) -> None:
    step, attempt = int(payload.pop(STEP_KEY, -1)), int(payload.pop(ATTEMPT_KEY, 0))
    _take_time(history, payload.pop("_timestamp", None))
    history.num_rows += 1
    history.newest_step = max(history.newest_step, step)
    history.attempts = max(history.attempts, attempt + 1)
    for key, value in payload.items():
        if isinstance(value, str):
            history.texts.setdefault(key, []).append((step, value))
        elif isinstance(value, dict):
            if value.get("_type") == "histogram":
                history.histograms.setdefault(key, []).append((step, value["counts"], value["edges"]))
        else:
            series = history.series.setdefault(key, Series())
            series.steps.append(step)
            series.values.append(float(value))
            series.attempts.append(attempt)


def _take_table(history: RunHistory, payload: dict[str, Any]) -> None:
    _take_time(history, payload.get("_timestamp"))
    record = TableRecord(
        step=int(payload.get(STEP_KEY, -1)),
        columns=tuple(payload["columns"]),
        rows=tuple(tuple(row) for row in payload["rows"]),
    )
    history.tables.setdefault(str(payload["key"]), []).append(record)


def _take_time(history: RunHistory, unix_time: float | None) -> None:
    if unix_time is not None:
        history.first_time = unix_time if history.first_time is None else min(history.first_time, unix_time)
        history.last_time = unix_time if history.last_time is None else max(history.last_time, unix_time)
