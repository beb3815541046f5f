"""What a person is told when W&B does not take a run's rows: what is wrong, what is not in danger, what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_KEPT: Final = "Training goes on, and every row is kept in the journal and sent when W&B takes it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One kind of trouble."""

    code: str
    """Stable short name."""
    advice: str


_KNOWN: Final[tuple[tuple[re.Pattern[str], Trouble], ...]] = (
    (
        re.compile(r"HTTP 429|rate limit|\b429\b", re.IGNORECASE),
        Trouble(
            code="wandb_rate_limited",
            advice="It is tried again by itself; if it lasts, set SIDESTEP_WANDB_ROWS_PER_SECOND lower than 10 or log "
            "fewer keys.",
        ),
    ),
    (
        re.compile(r"refused|HTTP 4\d\d|permission|api.?key|AuthenticationError|Invalid project", re.IGNORECASE),
        Trouble(
            code="wandb_refused",
            advice="Check WANDB_API_KEY, project and entity in the worker's environment (`wandb login --verify`), then "
            "restart the worker on the same journal; a new sink tries from time to time meanwhile.",
        ),
    ),
    (
        re.compile(r"no progress for"),
        Trouble(
            code="wandb_stalled",
            advice="The sink was killed and is started again where W&B stands; if it comes back, see the sink's log "
            "beside the journal (wandb-sink-RUN.log).",
        ),
    ),
    (
        re.compile(r"rows are missing|was lost on the way|its rows are sent again"),
        Trouble(code="wandb_rows_sent_again", advice="The sink is started again and sends them; nothing to do."),
    ),
    (
        re.compile(
            r"does not answer|server fails|CommError|timed? ?out|communicat|unreachable|HTTP 5\d\d", re.IGNORECASE
        ),
        Trouble(
            code="wandb_unreachable",
            advice="It is tried again by itself; if it lasts, check the network and WANDB_BASE_URL of the worker, or "
            "https://status.wandb.com. After the training `sidestep worker --journal DIR --until-idle` sends what is "
            "left.",
        ),
    ),
)
_UNKNOWN: Final = Trouble(
    code="wandb_sink_ended",
    advice="The sink is started again where W&B stands; if it comes back, see the sink's log beside the journal "
    "(wandb-sink-RUN.log).",
)
_FOREIGN: Final = Trouble(
    code="wandb_foreign_rows",
    advice="The sink is not started again. Give the run another id (SIDESTEP_RUN_ID), or remove the W&B run of that "
    "id, and restart the worker; `sidestep replay` brings the journal's rows to a fresh offline run.",
)


def trouble_of(detail: str, *, is_given_up: bool = False) -> Trouble:
    """Return what kind of trouble a sink's words are."""
    if is_given_up:
        return _FOREIGN
    return next((trouble for pattern, trouble in _KNOWN if pattern.search(detail)), _UNKNOWN)


def told(run_id: str, detail: str, trouble: Trouble) -> str:
    """Return the line for the console and the log."""
    return f"W&B does not take run {run_id} for now: {detail}. {_KEPT} {trouble.advice}"
