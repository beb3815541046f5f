"""What a run holds after its worker was killed: every row counted, in the journal, at W&B and in a replay."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from tests.support.wandb_backend import WandbBackend, table_path
from tests.support.wandb_offline import OfflineRun

from sidestep.worker.outbox import StoredEntry
from sidestep.worker.replay import ROWS_FILE
from sidestep.worker.sinks.outbox_reader import OutboxReader

_CLOCK_KEYS = ("_runtime", "_step", "_wandb")
_INCIDENT = re.compile(r"\[incident (.+)\]")
_MAY_BE = {"may_be": True}


@dataclass(kw_only=True)
class Counts:
    """Every count that is not marked ``may_be`` has to be 0, but for ``steps``, ``rows`` and ``tables``."""

    steps: int = field(default=0, metadata=_MAY_BE)
    rows: int = field(default=0, metadata=_MAY_BE)
    tables: int = field(default=0, metadata=_MAY_BE)
    alerts: int = field(default=0, metadata=_MAY_BE)
    rows_lost: int = 0
    rows_doubled: int = 0
    rows_out_of_place: int = 0
    """Rows that stand at another number than the outbox's."""
    rows_overwritten: int = 0
    """Rows that were sent again with other values."""
    holes: int = 0
    tables_lost: int = 0
    alerts_lost: int = 0
    messages_lost: int = 0
    messages_dropped: int = 0
    steps_lost: int = 0
    steps_doubled: int = 0
    row_numbers_wrong: int = 0
    steps_not_complete: int = 0
    not_identical: int = 0
    exit_code_wrong: int = 0
    tables_doubled: int = field(default=0, metadata=_MAY_BE)
    alerts_doubled: int = field(default=0, metadata=_MAY_BE)
    rows_sent_again: int = field(default=0, metadata=_MAY_BE)
    rows_sent_again_same_bytes: int = field(default=0, metadata=_MAY_BE)
    tables_linked_again: int = field(default=0, metadata=_MAY_BE)
    fragments: int = field(default=0, metadata=_MAY_BE)

    def wrong(self) -> list[str]:
        """Return which counts are not what they have to be."""
        found = []
        for each in fields(self):
            value = getattr(self, each.name)
            if value and not each.metadata.get("may_be"):
                found.append(f"{each.name} = {value}")
        return found


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A run's outbox."""

    entries: Sequence[StoredEntry]
    rows: Sequence[tuple[str, dict[str, Any]]]
    """Kind and values of each row and table, in the order of their numbers."""
    table_ids: Sequence[str]
    alert_ids: Sequence[str]

    @classmethod
    def read(cls, journal: Path, run_id: str) -> Self:
        """Read the outbox of a journal."""
        reader, entries = OutboxReader(journal, run_id), list[StoredEntry]()
        while batch := reader.after(entries[-1].position if entries else -1, 1_000):
            entries += batch
        reader.close()
        rows = [(entry.kind, entry.value()) for entry in entries if entry.row_number is not None]
        return cls(
            entries=entries,
            rows=rows,
            table_ids=[str(value["sidecar/table_id"]) for kind, value in rows if kind == "table"],
            alert_ids=[str(entry.value()["id"]) for entry in entries if entry.kind == "alert"],
        )


def count_journal(journal: Path, expected: Expected, published: Mapping[str, Any], incarnation: str) -> Counts:
    """Compare the journal with what the publisher says that it handed over."""
    closed = _query(journal / "index.sqlite", "SELECT step, reason FROM step_closed")
    steps = Counter(step for step, _ in closed)
    held = Counter[int]()
    for segment in journal.glob("segment-*.sqlite"):
        query = f"SELECT sequence FROM message WHERE incarnation = '{incarnation}'"  # noqa: S608 (a test's own name)
        held.update(sequence for (sequence,) in _query(segment, query))
    accounts = published["accounts"].values()
    numbers = [entry.row_number for entry in expected.entries if entry.row_number is not None]
    logged = Counter(value["train/step"] for kind, value in expected.rows if kind == "row" and "trainer/step" in value)
    return Counts(
        steps=len(steps),
        rows=sum(kind == "row" for kind, _ in expected.rows),
        tables=len(set(expected.table_ids)),
        alerts=len(set(expected.alert_ids)),
        messages_lost=len(set(range(1, sum(a["accepted"] for a in accounts) + 1)) ^ set(held)),
        messages_dropped=sum(a["dropped"] + a["refused"] + a["in_window"] for a in accounts),
        steps_lost=len(set(range(published["steps"])) ^ set(steps)),
        steps_doubled=sum(steps.values()) - len(steps),
        steps_not_complete=sum(reason != "complete" for _, reason in closed),
        rows_lost=len(set(range(published["steps"])) - set(logged)),
        rows_doubled=sum(logged.values()) - len(logged),
        row_numbers_wrong=sum(number != at for at, number in enumerate(numbers)),
        tables_doubled=len(expected.table_ids) - len(set(expected.table_ids)),
        alerts_doubled=len(expected.alert_ids) - len(set(expected.alert_ids)),
    )


def count_online(expected: Expected, backend: WandbBackend, run_id: str) -> Counts:
    """Compare a backend's run with the outbox."""
    run = backend.runs[run_id]
    history = run.history
    uploads = [
        str(row["sidecar/table_id"])
        for row in history
        if any((path := table_path(value)) and backend.has_table(path) for value in row.values())
    ]
    counts = _compared(expected, history, uploads, [alert["text"] for alert in run.alerts])
    counts.holes, counts.rows_overwritten = run.holes, run.overwritten_lines
    counts.rows_sent_again, counts.rows_sent_again_same_bytes = run.repeated_lines, run.identical_lines
    counts.tables_linked_again = run.relinked_tables
    counts.exit_code_wrong = int(run.exit_code != 0)
    return counts


def count_offline(expected: Expected, run: OfflineRun) -> Counts:
    """Compare W&B's offline fragments with the outbox."""
    rows = [_folded(row) for row in run.rows]
    whole = [
        str(row["sidecar/table_id"]) for row, table in zip(
            (row for row in rows if "sidecar/table_id" in row), _offline_tables(run), strict=False
        ) if table
    ]  # fmt: skip
    counts = _compared(expected, rows, whole, [text for _, text, _ in run.alerts])
    counts.holes = sum(steps != list(range(len(steps))) for steps in run.own_steps)
    counts.fragments = len(run.own_steps)
    counts.exit_code_wrong = int(run.exit_codes[-1] != 0)
    return counts


def _folded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put a table's record, which comes as ``KEY._type``, ``KEY.path`` and so on, back under its key."""
    tables = tuple(key.removesuffix("._type") for key, value in row.items() if value == "table-file")
    kept = {k: v for k, v in row.items() if not k.startswith(tuple(f"{key}." for key in tables))}
    return {**kept, **dict.fromkeys(tables, "table-file")}


def _offline_tables(run: OfflineRun) -> Iterable[bool]:
    """Yield, table by table, whether all staged files of it are there."""
    for files in run.artifacts:
        if any(name.endswith(".table.json") for name in files):
            yield all(path.is_file() for path in files.values())


def _compared(
    expected: Expected, got: Sequence[Mapping[str, Any]], uploaded: Sequence[str], alerts: Sequence[str]
) -> Counts:
    wanted_keys = [_scalars(value) for _, value in expected.rows]
    got_keys = [_scalars(value) for value in got]
    wanted = Counter(key for key, (kind, _) in zip(wanted_keys, expected.rows, strict=True) if kind == "row")
    found = Counter(key for key, value in zip(got_keys, got, strict=True) if "sidecar/table_id" not in value)
    told = Counter(match[1] for text in alerts if (match := _INCIDENT.search(text)))
    logged = [str(value["sidecar/table_id"]) for value in got if "sidecar/table_id" in value]
    return Counts(
        rows=found.total(),
        tables=len(set(uploaded)),
        alerts=len(told),
        rows_lost=(wanted - found).total(),
        rows_doubled=(found - wanted).total(),
        rows_out_of_place=sum(a != b for a, b in zip(wanted_keys, got_keys, strict=False))
        + abs(len(wanted_keys) - len(got_keys)),
        tables_lost=len(set(expected.table_ids) - set(uploaded)),
        tables_doubled=len(logged) - len(set(logged)),
        alerts_lost=len(set(expected.alert_ids) - set(told)),
        alerts_doubled=told.total() - len(told),
    )


def _scalars(values: Mapping[str, Any]) -> str:
    """Return what is to be equal of a row, however it came: all but W&B's clock and the table itself."""
    key = values.get("key") if "columns" in values else None
    left_out = {*_CLOCK_KEYS, "key", "columns", "rows", str(key)}
    kept = {k: v for k, v in values.items() if k not in left_out and not table_path(v) and v != "table-file"}
    # wandb-core writes 2.0 as 2
    plain = {k: float(v) if isinstance(v, int | float) else v for k, v in kept.items()}
    return json.dumps(plain, sort_keys=True)


def count_replay(expected: Expected, folder: Path, *, is_identical: bool) -> Counts:
    """Compare the bytes of a replay's entries with the outbox that the sinks were fed from."""
    made = (folder / ROWS_FILE).read_bytes().splitlines() if (folder / ROWS_FILE).is_file() else []
    recorded = [entry.payload for entry in expected.entries]
    payloads = [line.partition(b',"payload":')[2][:-1] for line in made]
    differing = sum(a != b for a, b in zip(payloads, recorded, strict=False)) + abs(len(payloads) - len(recorded))
    return Counts(rows=len(payloads), not_identical=differing + (not is_identical))


def _query(file: Path, text: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10.0)) as connection:
        return connection.execute(text).fetchall()
