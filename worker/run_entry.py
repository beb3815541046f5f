"""A run's first outbox entry: whose run it is, and with what it was started."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sidestep.protocol.messages import Hello, Json
from sidestep.worker.outbox import OutboxEntry, entry
from sidestep.worker.records import RunContext


def run_entry(context: RunContext, hello: Hello | None) -> OutboxEntry:
    """Return the ``run`` entry; without a Hello the run has an id and its settings alone."""
    said = hello or Hello()
    return entry(
        "run",
        {
            "run_id": context.run_id,
            "project": said.project,
            "entity": said.entity,
            "name": said.name,
            "tags": list(said.tags),
            "config": plain_json(said.run_config),
            "environment": plain_json(said.environment),
            "settings": plain_json(context.settings),
        },
    )


def plain_json(value: Json) -> Json:
    """Return ``value`` as JSON can say it: numbers that are not finite as texts, bytes by their size."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value
