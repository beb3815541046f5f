"""Small runs for the report, written into a journal through the real schema."""

from __future__ import annotations

import base64
import io
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from sidestep.worker.intake.schema import INDEX_SCHEMA
from sidestep.worker.outbox import NUMBERED_KINDS, OutboxEntry, entry

Entries = Sequence[OutboxEntry]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\"<b>"


def png() -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 200).save(buffer, "PNG")
    return {"_type": "image", "png": base64.b64encode(buffer.getvalue()).decode()}


def row(step: int, values: Mapping[str, Any], attempt: int = 0) -> OutboxEntry:
    return entry("row", {"_timestamp": 1.75e9 + step, "train/step": step, "train/attempt": attempt, **values})


def table(step: int, key: str, columns: list[str], rows: list[list[Any]]) -> OutboxEntry:
    head = {"_timestamp": 1.75e9 + step, "train/step": step, "train/attempt": 0, "sidecar/table_id": f"{key}@{step}"}
    return entry("table", {**head, "key": key, "columns": columns, "rows": rows})


def make_journal(folder: Path, entries: Entries) -> Path:
    """Write ``entries`` as the outbox of run ``run-1`` and return the journal's folder."""
    folder.mkdir()
    with closing(sqlite3.connect(folder / "index.sqlite")) as connection:
        connection.executescript(INDEX_SCHEMA)
        connection.execute("INSERT INTO run VALUES ('run-1', 1.0)")
        numbered = 0
        for position, item in enumerate(entries):
            number = numbered if item.kind in NUMBERED_KINDS else None
            numbered += item.kind in NUMBERED_KINDS
            values = ("run-1", position, item.kind, number, item.payload)
            connection.execute("INSERT INTO outbox VALUES (?, ?, ?, ?, ?)", values)
        connection.commit()
    return folder


def full_run(text: str) -> list[OutboxEntry]:
    """Return every form that a run writes, with ``text`` wherever a run's own text can stand."""
    histogram = {"_type": "histogram", "counts": [1, 4, 2], "edges": [0.0, 1.0, 2.0, 3.0]}
    entries = [entry("run", {"run_id": "run-1", "name": text, "project": text, "tags": [text], "config": {text: text}})]
    for step in range(0, 100, 25):
        values = {
            "loss/total": 3.0 / (step + 1),
            "loss/first_token": 2.0,
            "loss/std": 0.5,
            "loss/max": 4.0,
            "loss/min": 0.1,
            "tokens/pad_ratio": 0.2,
            "tokens/answer_length": 3.0,
            "tokens/total_tokens": 100,
            "gradients/global/total_norm": 1.5,
            "gradients/decoder/norm": 1.0,
            "gradients/decoder/head_weight/norm": 0.5,
            "gradients/decoder/head_weight/max": 0.1,
            "gradients/decoder/log10_histogram": histogram,
            "generation/avg_length": 4.5,
            "generation/min_length": 1,
            "generation/max_length": 9,
            "collapse/is_collapsed": 0,
            "collapse/collapse_reason": "none",
            "collapse/most_common_ratio": 0.2,
            "collapse/most_common_token_text": text,
            "data/answer_length_mean": 3.0,
            "data/answer_length_histogram": histogram,
            f"lr/{text}": 1e-3,
            text: 1.0,
            "sidecar/lag_seconds": 0.1,
        }
        entries.append(row(step, values))
        columns = ["step", "image", "question", "generated", "target", "length"]
        entries.append(table(step, "generation/samples", columns, [[step, png(), text, text, "3", 1]]))
        entries.append(
            table(step, "loss/highest_tokens", ["token", "context", "loss", "rank"], [[text, "a b", 4.0, 0]])
        )
    entries.append(entry("notice", {"text": text, "level": "warning", "code": "x"}))
    return entries
