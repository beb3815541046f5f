"""What W&B's server has of a run, and what it answers to uploads: asked beside the sink, on a thread of its own.

``run.log`` and ``run.finish`` say nothing of it: with the server away they return as ever, and after one upload that is
refused for good (HTTP 400, 401, 403, ...) wandb-core gives the rest of the run up while ``finish`` still looks well
(docs/delivery.md, section 4). So the rows are counted where they have to be.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

_LOG: Final = logging.getLogger(__name__)

_ROUND_SECONDS: Final = 1.0
_ASK_SECONDS: Final = 10.0
_ASK_AGAIN_SECONDS: Final = 3.0
_MAX_TEXT_CHARACTERS: Final = 200
_RATE_LIMIT_STATUS: Final = 429
_FINAL_STATUSES: Final = frozenset({400, 401, 403, 404, 409, 410, 413, 422})
"""wandb-core does not try again after one of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRun:
    """A run as the server has it."""

    num_rows: int
    state: str
    """``running``, ``finished``, ``failed``, ``crashed``, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The server's answer to an upload, where it is not well."""

    status: int
    text: str


def complaint_of(answer: Answer) -> str:
    """Return what is wrong, for people."""
    said = f"HTTP {answer.status} {answer.text.strip()[:_MAX_TEXT_CHARACTERS]}".strip()
    if answer.status == _RATE_LIMIT_STATUS:
        return f"W&B limits the rate of uploads ({said})"
    if answer.status in _FINAL_STATUSES:
        return f"W&B refused an upload for good ({said})"
    return f"W&B's server fails ({said})"


class ServerWatch:
    """Keeps ``rows`` and ``complaint`` up to date. ``start`` makes the thread, which ends with the process."""

    def __init__(
        self,
        ask: Callable[[], ServerRun],
        answers: Callable[[], Iterable[Answer]],
        handed_rows: Callable[[], int],
        *,
        ask_seconds: float = _ASK_SECONDS,
    ) -> None:
        """Ask nothing yet; ``handed_rows`` says how many rows W&B was given."""
        self._ask, self._answers, self._handed_rows = ask, answers, handed_rows
        self._ask_seconds = ask_seconds
        self._ask_at = 0.0
        self._complaint_rows = 0
        self.rows: int | None = None
        """Rows that the server had when it was last asked."""
        self.complaint = ""
        """What is wrong at the moment."""

    def start(self) -> None:
        """Watch from now on."""
        threading.Thread(target=self._watch, name="wandb-server", daemon=True).start()

    def _watch(self) -> None:
        self._ask_at = time.monotonic() + self._ask_seconds
        while True:
            time.sleep(_ROUND_SECONDS)
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Go round once; a round waits as long as ``ask`` and ``answers`` do."""
        try:
            for answer in self._answers():
                self._complain(complaint_of(answer))
        except Exception as error:  # noqa: BLE001 (a core that is gone is noticed where rows are logged)
            _LOG.debug("wandb-core does not say what the server answers: %r", error)
        if now < self._ask_at:
            return
        try:
            found = self._ask()
        except Exception as error:  # noqa: BLE001 (said as a complaint)
            self._ask_at = time.monotonic() + _ASK_AGAIN_SECONDS
            if not self.complaint:  # what the server said is more than that it is silent
                self._complain(f"W&B's server does not answer ({str(error)[:_MAX_TEXT_CHARACTERS]})")
        else:
            self._ask_at = time.monotonic() + (_ASK_AGAIN_SECONDS if self.complaint else self._ask_seconds)
            self.rows = found.num_rows
            if found.num_rows >= self._complaint_rows:
                self.complaint = ""

    def _complain(self, complaint: str) -> None:
        self.complaint, self._complaint_rows = complaint, self._handed_rows()
        self._ask_at = min(self._ask_at, time.monotonic() + _ASK_AGAIN_SECONDS)
