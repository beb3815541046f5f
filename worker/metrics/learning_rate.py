"""``lr/``: the rates that a step was taken with (docs/metrics.md, ``lr/``)."""

from __future__ import annotations

from collections.abc import Sequence

from sidestep.protocol.messages import LearningRates
from sidestep.worker.metrics.measurement import Measurement, messages_of
from sidestep.worker.records import Part, RunContext


def measure_learning_rates(parts: Sequence[Part], context: RunContext) -> Measurement:
    """Return ``lr/{group}`` of one step: what the lowest rank says, since all ranks step with the same rates.

    A group that the table ``groups`` does not name goes by its index; a rate that is not finite is absent.
    """
    found = Measurement()
    received = messages_of(parts, LearningRates)
    if not received:
        return found
    _, newest = min(received, key=lambda pair: pair[0])
    listed = context.groups.get("names")
    names = [str(name) for name in listed] if isinstance(listed, list | tuple) else []
    for index, rate in enumerate(newest.rates.tolist()):
        found.put(f"lr/{names[index] if index < len(names) else index}", rate)
    return found
