"""What is known of a trained run beside its recording, and the file that it stands in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FACTS_FILE = "facts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run that is wanted."""

    case: str
    suite: str
    seed: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a training came to."""

    case: str
    suite: str
    seed: int
    num_steps: int
    onset: int
    digest: str
    """Of the code that trained it."""
    held_out_loss: float
    held_out_accuracy: float
    image_gap: float
    final_loss: float
    """Mean of the trainer's last 20 losses."""
    seconds: float
    """Wall time of the steps, hooks and generation included."""
    cpu_seconds: float
    """CPU time of the same, the writing of the recording included."""
    hook_seconds: float
    """Wall time in the hooks as they measure it themselves, over all ranks; generation and probes left out."""
    wait_seconds: float
    """Wall time of generation and probes."""
    signal_seconds: float
    """Of `hook_seconds`, what every step's signals took."""
    rows_share: float
    """Mean share of the signals' rows that was in use; below 1 where they were thinned to keep the budget."""
    hook_failures: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    """The trainer's loss at each step."""
    gradient_norms: list[float] = field(default_factory=list)
    """Norm of the gradient before clipping, of the first rank, at each step."""


def write_facts(folder: Path, facts: Facts) -> None:
    """Write the facts as JSON, all at once."""
    fresh = folder / f".{FACTS_FILE}.new"
    fresh.write_text(json.dumps(asdict(facts)), encoding="utf-8")
    fresh.replace(folder / FACTS_FILE)


def read_facts(folder: Path) -> Facts | None:
    """Return the facts; None where the run was not finished."""
    file = folder / FACTS_FILE
    if not file.is_file():
        return None
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return Facts(**value)
