"""What the W&B sink must remember over a kill and cannot read back from W&B: a small JSON file in its output folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

_MAX_ALERT_ATTEMPTS: Final = 3


@dataclass(slots=True, kw_only=True)
class Marks:
    """Marks of one run; ``save`` writes them whole, so a kill leaves the old file or the new one."""

    path: Path
    alert_attempts: dict[str, int] = field(default_factory=dict)
    """Incident id to how often it was handed to W&B without a sign that it arrived; written before each attempt."""
    alert_rows: dict[str, int] = field(default_factory=dict)
    """Incident id to the number of the row that followed its last attempt."""
    alerts_sent: set[str] = field(default_factory=set)
    """Incident ids that are known to have arrived."""
    finished_position: int = -1
    """The run was finished with everything up to here sent."""
    fragment_rows: dict[str, int] = field(default_factory=dict)
    """Offline fragments to their rows, for those that ``wandb sync --clean`` takes away."""
    tables_open: list[int] = field(default_factory=list)
    """Row numbers of tables that were logged without a sign that their files arrived; marked before each is logged."""
    table_repeats: dict[str, int] = field(default_factory=dict)
    """Table's id to how often it was asked for once more."""
    end_attempts: int = 0
    """How often the run's end was sent without a sign that the server knows of it."""
    stop_check_rows: int = -1
    """Rows handed to W&B when it asked to stop; -1: no such question is open."""

    @classmethod
    def load(cls, path: Path) -> Marks:
        """Read the marks; a file that is absent means none. Raises ValueError where it is not a file of marks."""
        try:
            fields: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return cls(path=path)
        try:
            return cls(path=path, **{**fields, "alerts_sent": set(fields["alerts_sent"])})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold the W&B sink's marks; move it away to start without them"
            ) from error

    def save(self) -> None:
        """Write the marks and wait until they are on the disk; raises OSError."""
        fields = asdict(self)
        del fields["path"]
        fields["alerts_sent"] = sorted(self.alerts_sent)
        draft = self.path.with_suffix(".new")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)

    def begin_table(self, row: int) -> None:
        """Mark a table that is about to be logged as this row."""
        if row not in self.tables_open:
            self.tables_open.append(row)
            self.save()

    def confirm_tables(self, rows: Iterable[int]) -> None:
        """Take the tables of these rows as uploaded, or as somebody else's business."""
        done = set(rows) & set(self.tables_open)
        if done:
            self.tables_open = [row for row in self.tables_open if row not in done]
            self.save()

    def begin_alert(self, incident_id: str, next_row: int) -> bool:
        """Mark an attempt at an alert; False where it has arrived, or was tried often enough."""
        attempts = self.alert_attempts.get(incident_id, 0)
        if incident_id in self.alerts_sent or attempts >= _MAX_ALERT_ATTEMPTS:
            return False
        self.alert_attempts[incident_id] = attempts + 1
        self.alert_rows[incident_id] = next_row
        self.save()
        return True

    def confirm_alerts(self, incident_ids: Iterable[str]) -> None:
        """Take what was attempted as arrived."""
        confirmed = self.alert_attempts.keys() & set(incident_ids)
        for incident_id in confirmed:
            del self.alert_attempts[incident_id], self.alert_rows[incident_id]
        if confirmed:
            self.alerts_sent |= confirmed
            self.save()

    def confirm_alerts_before(self, row: int) -> None:
        """Take alerts as arrived that went before a row that W&B has: an alert is sent at once, a row later."""
        self.confirm_alerts([incident_id for incident_id, next_row in self.alert_rows.items() if next_row < row])
