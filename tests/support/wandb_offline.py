"""Reads an offline run of W&B back: rows, alerts, config, tables, as W&B's own protobuf says them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK_BYTES = 32 * 1024
_HEAD = struct.Struct("<IHB")


@dataclass(kw_only=True)
class OfflineRun:
    """What one or more fragments hold, in their order."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """History records; nested keys are joined by dots; ``_step`` counts over all fragments, as ``wandb sync`` has
    it."""
    own_steps: list[list[int]] = field(default_factory=list)
    """Per fragment the ``_step`` that W&B gave to each of its rows."""
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    """Title, text, level."""
    log_lines: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    """Metric's name or glob to its step metric."""
    artifacts: list[dict[str, Path]] = field(default_factory=list)
    """Per artifact its files, by their names in it."""
    exit_codes: list[int | None] = field(default_factory=list)
    """Per fragment; None: it was never finished."""
    names: set[tuple[str, str, str]] = field(default_factory=set)
    """Project, entity, display name."""
    tags: set[str] = field(default_factory=set)
    starts: list[float] = field(default_factory=list)
    """When each fragment's run began, in unix seconds."""

    def tables(self, key: str) -> list[tuple[dict[str, Any], dict[str, Path]]]:
        """Return the tables that were logged under ``key``: their JSON, and the files that it names (pictures)."""
        name = f"{key}.table.json"
        return [(json.loads(files[name].read_bytes()), files) for files in self.artifacts if name in files]


def read_fragments(folder: Path) -> OfflineRun:
    """Read every fragment under ``folder/wandb``, oldest first."""
    run = OfflineRun()
    for place in sorted((folder / "wandb").glob("offline-run-*")):
        run.exit_codes.append(None)
        run.own_steps.append([])
        logs = sorted(place.glob("run-*.wandb"))  # none where the writer was killed before its first record
        for content in whole_records(logs[0].read_bytes() if logs else b""):
            record: Any = getattr(pb, "Record")()  # noqa: B009 (the generated module has no types)
            record.ParseFromString(content)
            _add(run, record)
    return run


def whole_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a transaction log until the first that is torn."""
    position, joined = 7, b""
    while position + _HEAD.size <= len(content):
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _HEAD.size:
            position += left_in_block
            continue
        checksum, length, kind = _HEAD.unpack_from(content, position)
        piece = content[position + _HEAD.size :][:length]
        if not kind or len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += _HEAD.size + length
        joined = piece if kind in {1, 2} else joined + piece
        if kind in {1, 4}:
            yield joined


def _add(run: OfflineRun, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "history":
        row = _values(record.history.item)
        run.own_steps[-1].append(row["_step"])
        row["_step"] = len(run.rows)
        run.rows.append(row)
    elif kind == "alert":
        run.alerts.append((record.alert.title, record.alert.text, record.alert.level))
    elif kind == "output_logger":
        run.log_lines.append(record.output_logger.line)
    elif kind == "metric":
        run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    elif kind == "artifact":
        run.artifacts.append({entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents})
    elif kind == "config":
        run.config |= _values(record.config.update)
    elif kind == "run":
        run.config |= _values(record.run.config.update)
        run.names.add((record.run.project, record.run.entity, record.run.display_name))
        run.tags |= set(record.run.tags)
        run.starts.append(record.run.start_time.ToNanoseconds() / 1e9)
    elif kind == "exit":
        run.exit_codes[-1] = record.exit.exit_code


def _values(items: Iterable[Any]) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
