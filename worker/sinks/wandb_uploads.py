"""Which tables W&B's server has with their files: a row that names a table is there long before the table is.

The row travels in the run's file stream, the table as an artifact of its own; a kill between the two leaves a row that
names nothing (docs/delivery.md, section 4). So each table is marked before it is logged and unmarked when its upload is
committed; what is still marked when the next child begins has to be sent once more.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any, Final, Protocol

_LOG: Final = logging.getLogger(__name__)


class SaveHandle(Protocol):
    """wandb's promise of an answer to an upload."""

    def wait_or(self, *, timeout: float | None) -> Any:
        """Wait for the answer; raises where it will never come."""


class TableUploads:
    """Waits for uploads on a thread of its own, one after another, in the order of their rows."""

    def __init__(self) -> None:
        self._handles: queue.SimpleQueue[tuple[int, SaveHandle]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._uploaded: set[int] = set()
        self._thread: threading.Thread | None = None

    def watch(self, row_number: int, handle: SaveHandle) -> None:
        """Wait for the upload of this row's table."""
        self._handles.put((row_number, handle))
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="table-uploads", daemon=True)
            self._thread.start()

    def done(self, row_number: int) -> None:
        """Take this row's table as arrived."""
        with self._lock:
            self._uploaded.add(row_number)

    def take(self) -> set[int]:
        """Return, once, the rows whose tables are on the server."""
        with self._lock:
            uploaded, self._uploaded = self._uploaded, set()
        return uploaded

    def _wait(self) -> None:
        while True:
            row_number, handle = self._handles.get()
            try:
                problem = handle.wait_or(timeout=None).response.log_artifact_response.error_message
            except Exception as error:  # noqa: BLE001 (a core that died: the table stays marked)
                problem = f"{type(error).__name__}: {error}"
            if problem:
                _LOG.warning("the table of row %d was not uploaded: %s", row_number, problem)
                continue
            self.done(row_number)
