"""What the W&B child process tells its supervisor: one line of JSON at a time on its standard output."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

EXIT_AGAIN: Final = 75
"""The child ended so that a new one goes on where W&B stands (a lost wandb-core, an unreachable server)."""
EXIT_NEVER: Final = 65
"""The child ended for a reason that a new one would meet again (rows that are not the outbox's)."""


class SinkState(StrEnum):
    """Where the child stands."""

    STARTING = "starting"
    """Waits for the run's first entry, for the lock, or for ``wandb.init``."""
    RUNNING = "running"
    FINISHING = "finishing"
    """Waits for the uploads of ``run.finish``."""
    FINISHED = "finished"
    """The run is finished as its last entry says; nothing is left to send."""
    SUSPENDED = "suspended"
    """Ended because it was asked to; the rest stays in the outbox."""
    STOP_REQUESTED = "stop_requested"
    """W&B asked to stop: whether the page or a refused upload, the next child finds out."""
    STOPPED_BY_PAGE = "stopped_by_page"
    """Somebody pressed "Stop run" on the web page: for the trainer to hear. The sink goes on."""
    UPLOAD_REFUSED = "upload_refused"
    """The server refused an upload for good and rows were lost on the way; the next child sends them again."""
    FAILED = "failed"
    """A call into W&B raised; ``detail`` says what."""
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One report of the child."""

    state: SinkState
    position: int = -1
    """Outbox position up to which every entry was handed to W&B, or needs not be."""
    num_rows: int = 0
    """Rows that were handed to W&B, those of earlier children included: the next ``_step``."""
    alerts_sent: int = 0
    alerts_suppressed: int = 0
    """Repeats of an incident, and what went beyond the flood limit."""
    entries_refused: int = 0
    """Entries whose payload W&B or this version cannot take; rows among them are logged without their values."""
    confirmed_position: int = -1
    """Outbox position up to which W&B is known to have every row: where it stood when the run was opened, as far as its
    server was heard since, all of it when a run was ended and looked after."""
    tables_undone: tuple[int, ...] = ()
    """Row numbers of tables that an earlier child logged and perhaps did not upload; they are to be sent once more."""
    complaint: str = ""
    """What is wrong between wandb-core and W&B's server at the moment."""
    detail: str = ""

    def line(self) -> bytes:
        """Return the report as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Progress:
        """Read a line; raises ValueError where it is not a report."""
        try:
            fields = json.loads(line)
            return cls(
                **{**fields, "state": SinkState(fields["state"]), "tables_undone": tuple(fields["tables_undone"])}
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a report of the W&B sink: {line[:200]!r}") from error
