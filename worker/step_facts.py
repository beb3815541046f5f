"""What a step says of its own delivery: ranks, late parts, time in hooks, skipped updates (``sidecar/*``).

Each is described in docs/sidecar_metrics.md; what became of the messages is in ``run_accounts.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from sidestep.protocol.messages import Kind, Signals
from sidestep.worker.metrics.measurement import Measurement, Value, messages_of
from sidestep.worker.records import AssembledStep


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
    if step.ends or step.num_messages is None:  # the wire 1.0's tails said 0
        found.put("sidecar/lag_seconds", step.lag_seconds)
    if step.ends:
        found.put("train/epoch", max(end.epoch for end in step.ends.values()))
        found.put("sidecar/hook_ms", 1_000.0 * max(end.hook_seconds for end in step.ends.values()))
    signals = [message for _, message in messages_of(step.parts.get(Kind.SIGNALS, ()), Signals)]
    shares = [share for share in map(_overhead, signals) if share is not None]
    if shares:
        found.put("sidecar/overhead", max(shares))
        found.put("sidecar/signal_rows_share", min(each.rows_share for each in signals))
    return found.values


def _overhead(signals: Signals) -> float | None:
    """Share of a rank's step, its waiting left out, that its signals took; None where it is not known."""
    worked = signals.step_seconds - signals.wait_seconds
    took = max(signals.signal_seconds, signals.device_seconds)
    return min(1.0, took / worked) if signals.step_seconds > 0 and worked > 0 and took >= 0 else None


def changed(facts: Mapping[str, Value], before: Mapping[str, Value]) -> bool:
    """Whether any fact differs from what was written last."""
    return any(before.get(key) != value for key, value in facts.items())
