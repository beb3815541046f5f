"""Which rank stands out at a step: in loss, in the time before it waits for the others, in the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Final

import numpy as np

from sidestep.protocol.messages import Kind, Notice, Signals
from sidestep.worker.copy_norms import whole_norms
from sidestep.worker.metrics.measurement import Measurement, Value, distinct_batches, messages_of, notice_once
from sidestep.worker.records import AssembledStep, RunContext

MAX_NAMED_RANKS: Final = 8


def missing_ranks(step: AssembledStep, context: RunContext) -> Notice | None:
    """Return what is to be said once of a step that is shown without all its ranks; None where all are in it."""
    if not _lacks_ranks(step, context):
        return None
    missing = [rank for rank in range(step.ranks_expected) if rank not in step.ends]
    more = f" and {len(missing) - MAX_NAMED_RANKS} more" if len(missing) > MAX_NAMED_RANKS else ""
    text = (
        f"step {step.step} is shown with {step.ranks_seen} of {step.ranks_expected} ranks: rank "
        f"{', '.join(map(str, missing[:MAX_NAMED_RANKS]))}{more} had not ended it in time (such steps have "
        "sidecar/ranks_seen and sidecar/ranks_expected; values are over the ranks that were seen)"
    )
    return notice_once("ranks_missing", text, step.step)


def _lacks_ranks(step: AssembledStep, context: RunContext) -> bool:
    return step.reason != "tail" and step.ranks_seen < step.ranks_expected and _says_copies(context)


def _says_copies(context: RunContext) -> bool:
    """Whether the trainer is one of the wire 1.2: what older ones' journals replay to stays as it was."""
    return any("copy" in topology for topology in context.topologies.values())


def rank_facts(step: AssembledStep, context: RunContext) -> dict[str, Value]:
    """Return ``sidecar/ranks/*`` of a step: nothing with one rank, or from trainers before the wire 1.2."""
    found = Measurement()
    if _lacks_ranks(step, context):
        found.put("sidecar/ranks_expected", step.ranks_expected)
    parts = step.parts.get(Kind.SIGNALS, ())
    signals = messages_of(parts, Signals)
    if len(signals) < 2 or not _says_copies(context):
        return found.values
    batches = messages_of(distinct_batches(parts, context), Signals)
    _put(found, "loss", {rank: loss for rank, message in batches if (loss := _loss(message)) is not None})
    _put(found, "forward_seconds", {rank: m.forward_seconds for rank, m in signals if m.forward_seconds >= 0})
    norms = {rank: norm for rank, norm in whole_norms(signals, context).items() if math.isfinite(norm)}
    _put(found, "gradient_norm", norms)
    return found.values


def _put(found: Measurement, name: str, by_rank: Mapping[int, float]) -> None:
    """Put the rank that is farthest from the median, and by how much; the lowest of those that are alike."""
    finite = {rank: value for rank, value in sorted(by_rank.items()) if math.isfinite(value)}
    if len(finite) < 2:
        return
    middle = median(finite.values())
    farthest = max(finite, key=lambda rank: (_outlying(name, finite[rank], middle), finite[rank], -rank))
    found.put(f"sidecar/ranks/{name}", finite[farthest])
    found.put(f"sidecar/ranks/{name}_gap", finite[farthest] - middle)
    found.put(f"sidecar/ranks/{name}_rank", farthest)


def _outlying(name: str, value: float, middle: float) -> float:
    """Copies of a gradient should be alike either way; losses and times stand out where they are high."""
    return abs(value - middle) if name == "gradient_norm" else value - middle


def _loss(message: Signals) -> float | None:
    losses = message.losses.astype(np.float64)
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if finite.size else None
