"""What a step says of its own delivery: ranks, drops, late parts, time in hooks, skipped updates (``sidecar/*``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from sidestep.protocol.messages import Kind
from sidestep.worker.metrics.measurement import Measurement, Value
from sidestep.worker.records import AssembledStep

MAX_DROPPED: Final = 1 << 40
"""More messages than a step can lose: a larger count is not believed."""


def telling_facts(step: AssembledStep) -> dict[str, Value]:
    """Return the facts that are worth a row by themselves: all else than a whole step, applied in time."""
    facts: dict[str, Value] = {}
    if any(not end.applied for end in step.ends.values()):
        facts["train/skipped"] = 1
    if step.reason != "tail" and step.ranks_seen < step.ranks_expected:
        facts["sidecar/ranks_seen"] = step.ranks_seen
    # What the trainer logs under a step that is over is its own choice, not a message that came too late.
    num_late = sum(part.message.kind != Kind.SCALARS for part in step.late_parts)
    if num_late:
        facts["sidecar/late_parts"] = num_late
    return facts


def companion_facts(step: AssembledStep) -> dict[str, Value]:
    """Return the facts that stand in a row that is written anyway."""
    found = Measurement()
    found.put("sidecar/lag_seconds", step.lag_seconds)
    if step.ends:
        found.put("train/epoch", max(end.epoch for end in step.ends.values()))
        found.put("sidecar/hook_ms", 1_000.0 * max(end.hook_seconds for end in step.ends.values()))
    return found.values


def lost_messages(step: AssembledStep, dropped_so_far: Counter[str]) -> dict[str, Value]:
    """Return ``sidecar/dropped/{kind}`` and ``sidecar/refused/{kind}``, cumulative, where they are not 0.

    The publishers' own cumulative accounts count where the step carries them; else what the steps' ends say is summed
    up in ``dropped_so_far``, which is advanced.
    """
    for end in step.ends.values():
        dropped_so_far.update({kind: min(n, MAX_DROPPED) for kind, n in end.dropped.items()})
    facts: dict[str, Value] = {f"sidecar/dropped/{kind}": n for kind, n in sorted(dropped_so_far.items()) if n}
    for kind, (_, dropped, refused) in sorted(step.accounts.items()):
        if dropped:
            facts[f"sidecar/dropped/{kind}"] = dropped
        if refused:
            facts[f"sidecar/refused/{kind}"] = refused
    return facts


def changed(facts: Mapping[str, Value], before: Mapping[str, Value]) -> bool:
    """Whether any fact differs from what was written last."""
    return any(before.get(key) != value for key, value in facts.items())
