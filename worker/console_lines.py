"""The lines that both consoles show at an evaluation (docs/metrics.md, "Early warnings")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sidestep.worker.metrics.measurement import Value

REMEMBERED: Final = ("loss/total", "loss/trainer", "gradients/global/total_norm")
"""Metrics whose last value is shown at an evaluation that does not measure them itself."""


def generation_line(step: int, values: Mapping[str, Value]) -> str | None:
    """Return the line of the average generation length; None where nothing was generated."""
    average = values.get("generation/avg_length")
    if not isinstance(average, int | float):
        return None
    low, high = values.get("generation/min_length"), values.get("generation/max_length")
    return f"step {step}: average generation length {average:.1f} tokens (min {low}, max {high})"


def key_metrics_line(step: int, values: Mapping[str, Value], remembered: Mapping[str, tuple[int, Value]]) -> str:
    """Return the line of key metrics: those of this step, else the last ones known, with their (step, value)."""
    known = {**{key: value for key, (_, value) in remembered.items()}, **values}
    loss = "loss/total" if "loss/total" in known else "loss/trainer"
    pieces = [f"step {step}"]
    for label, key, form in (
        ("epoch", "train/epoch", "d"),
        ("loss", loss, ".4f"),
        ("grad norm", "gradients/global/total_norm", ".3g"),
        ("avg generation length", "generation/avg_length", ".1f"),
        ("unique tokens", "collapse/unique_tokens", "d"),
        ("most common ratio", "collapse/most_common_ratio", ".2f"),
    ):
        value = known.get(key)
        if isinstance(value, int | float):
            measured_at = step if key in values else remembered[key][0]
            pieces.append(f"{label} {value:{form}}" + (f" (step {measured_at})" if measured_at != step else ""))
    if "collapse/collapse_reason" in values:
        pieces.append(f"collapse {values['collapse/collapse_reason']}")
    return " | ".join(pieces)
