"""What several ranks log under one name, made one value as they asked: ``hooks.log(..., reduce="mean")``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from sidestep.protocol.messages import Scalars
from sidestep.worker.metrics.measurement import messages_of
from sidestep.worker.records import Part

REDUCTIONS: Final[Mapping[str, Callable[[Sequence[float]], float]]] = {
    "mean": lambda values: math.fsum(values) / len(values),
    "sum": math.fsum,
    "min": min,
    "max": max,
}
"""What may stand in ``Scalars.reduce``; anything else leaves the lowest rank's value."""


def spoken_scalars(parts: Sequence[Part]) -> list[tuple[int, Scalars]]:
    """Return (rank, message) of a step's ``Scalars``, by rank; of those to be reduced one, as its lowest rank's.

    Of a name that a rank logged several times in the step, the n-th is reduced with the other ranks' n-th. A value that
    is no finite number makes the result none, and it is left to be counted.
    """
    spoken: list[tuple[int, Scalars]] = []
    together: dict[tuple[Any, ...], list[tuple[int, Scalars]]] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for rank, message in sorted(messages_of(parts, Scalars), key=lambda pair: pair[0]):
        if message.reduce not in REDUCTIONS:
            spoken.append((rank, message))
            continue
        what = (message.reduce, message.step_key, message.key_step, tuple(sorted(message.values)))
        number = seen[(rank, *what)] = seen.get((rank, *what), -1) + 1
        together.setdefault((*what, number), []).append((rank, message))
    spoken += [(messages[0][0], _reduced([message for _, message in messages])) for messages in together.values()]
    return sorted(spoken, key=lambda pair: pair[0])


def _reduced(messages: Sequence[Scalars]) -> Scalars:
    first = messages[0]
    reduce = REDUCTIONS[first.reduce]
    return replace(first, values={name: _joined(reduce, [m.values[name] for m in messages]) for name in first.values})


def _joined(reduce: Callable[[Sequence[float]], float], values: Sequence[Any]) -> Any:
    numbers = [float(value) for value in values if isinstance(value, bool | int | float)]
    if len(numbers) < len(values):
        return values[0]  # texts and maps are not reduced: the lowest rank's stands
    return reduce(numbers) if all(map(math.isfinite, numbers)) else math.nan
