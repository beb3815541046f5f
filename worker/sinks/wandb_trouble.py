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


_RATE_LIMITED: Final = Trouble(
    code="wandb_rate_limited",
    advice="It is tried again by itself; if it lasts, set SIDESTEP_WANDB_ROWS_PER_SECOND lower than 10, or log less.",
)
_UNREACHABLE: Final = Trouble(
    code="wandb_unreachable",
    advice="It is tried again by itself; if it lasts, check the network and WANDB_BASE_URL of the worker, or "
    "https://status.wandb.com. After the training `sidestep worker --journal DIR --until-idle` sends what is left.",
)
_REFUSED: Final = Trouble(
    code="wandb_refused",
    advice="A new sink tries from time to time. If it lasts, check WANDB_API_KEY, project and entity in the worker's "
    "environment (`wandb login --verify`) and restart the worker on the same journal.",
)
_STALLED: Final = Trouble(
    code="wandb_stalled",
    advice="The sink was killed and is started again where W&B stands; if it comes back, see the sink's log beside the "
    "journal (wandb-sink-RUN.log).",
)
_SENT_AGAIN: Final = Trouble(
    code="wandb_rows_sent_again", advice="The sink is started again and sends them; nothing to do."
)
_KNOWN: Final[tuple[tuple[str, Trouble], ...]] = (
    (r"no progress for", _STALLED),
    (r"rows are missing|its rows are sent again|answer that the run has ended", _SENT_AGAIN),
    (r"HTTP 429|rate limit|error 429", _RATE_LIMITED),
    (
        r"connection refused|deadline exceeded|dial tcp|no such host|does not answer|server fails|error 5\d\d",
        _UNREACHABLE,
    ),
    (r"refused an upload|HTTP 4\d\d|error 4\d\d|permission|api.?key|AuthenticationError|invalid project", _REFUSED),
    (r"CommError|timed? ?out|communicat", _UNREACHABLE),
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
    found = (trouble for pattern, trouble in _KNOWN if re.search(pattern, detail, re.IGNORECASE))
    return next(found, _UNKNOWN)


def told(run_id: str, detail: str, trouble: Trouble) -> str:
    """Return the line for the console and the log."""
    plain = " ".join(detail.split()).rstrip(".")
    return f"W&B does not take run {run_id} for now ({trouble.code}): {plain}. {_KEPT} {trouble.advice}"
