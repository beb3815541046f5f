"""Whether a failure did harm: what admits it, and what is only listed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.detection.case import Case, Harm
from benchmarks.detection.facts import Facts

LEAST_RISE = 0.05
"""Share by which the held-out loss must be worse than the twin's."""
LEAST_TWIN_GAP_NATS = 0.05
"""A twin that does not look at its images cannot lose them."""
LOST_SHARE = 0.5
"""An image gap below this share of the twin's is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a failure came to, beside its healthy twin of the same seed."""

    is_admitted: bool
    why: str
    loss: float
    twin_loss: float
    image_gap: float
    twin_image_gap: float


def admit(case: Case, failed: Facts, twin: Facts) -> Admission:
    """Compare a failed run with its healthy twin."""
    rise = failed.held_out_loss / twin.held_out_loss - 1.0 if twin.held_out_loss > 0 else math.inf
    reasons = []
    if not math.isfinite(failed.held_out_loss):
        reasons.append("the model is broken: its held-out loss is no number")
    elif rise >= LEAST_RISE:
        reasons.append(f"held-out loss {rise:+.0%}")
    if twin.image_gap >= LEAST_TWIN_GAP_NATS and not failed.image_gap >= LOST_SHARE * twin.image_gap:
        reasons.append(f"image gap {failed.image_gap:.2f} of {twin.image_gap:.2f} nats")
    if case.harm is Harm.INVARIANT:
        reasons.append(f"broken: {case.invariant}")
    return Admission(
        is_admitted=bool(reasons),
        why="; ".join(reasons) or f"no harm: held-out loss {rise:+.1%}, image gap {failed.image_gap:.2f}",
        loss=failed.held_out_loss,
        twin_loss=twin.held_out_loss,
        image_gap=failed.image_gap,
        twin_image_gap=twin.image_gap,
    )
