"""Which keys are drawn against which axis.

Every family of docs/metrics.md stands against ``train/step`` by one glob. All other keys are named one by one when they
first appear, because W&B resolves overlapping globs at random: names given here are disjoint. ``data/`` has two axes,
the values of an epoch (``..._epoch_3``) stand against ``train/step`` and those without the suffix against ``epoch``.

The dashboard's six sections (Generation Quality, Collapse Detection, Loss Analysis, Token Statistics, Gradient Health,
Data Quality) are the prefixes ``generation/``, ``collapse/``, ``loss/``, ``tokens/``, ``gradients/`` and ``data/``:
W&B's workspace makes one section of panels of each prefix by itself. Their titles and order belong to a saved
workspace, which only the server's interface can make; the SDK, offline or online, sets neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from sidestep.protocol.metric_names import FAMILIES

STEP_KEY: Final = "train/step"
EPOCH_KEY: Final = "epoch"
AXES_KEY: Final = "_axes"
"""A row's own entry of key to step key, for values that the trainer logs against an axis of its own; it is not
logged."""

_STEP_PREFIXES: Final = frozenset({*FAMILIES, "incidents", "sidecar"}) - {"data"}
_WITH_EPOCH: Final = re.compile(r"(data/.+)_epoch_\d+")
_UNDRAWN: Final = frozenset({"_timestamp", "_step", "_runtime", AXES_KEY})


class Axes:
    """Remembers which names of a run have been given their axis."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def unnamed(self, row: Mapping[str, object]) -> Iterator[tuple[str, str | None]]:
        """Yield each metric name (a key, or a glob) that the row needs and that had no axis yet, with its axis.

        An axis itself has none (None): it is named so that it is not drawn against W&B's own counter by chance.
        """
        own = row.get(AXES_KEY)
        axes: dict[str, str] = {str(k): str(v) for k, v in own.items()} if isinstance(own, Mapping) else {}
        for name, axis in _names(row.keys(), axes):
            if name not in self._named:
                self._named.add(name)
                yield name, axis


def _names(keys: Iterable[str], own: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    present = {key for key in keys if "*" not in key}  # a star would make a glob of it
    axes = {STEP_KEY, *own.values(), *({EPOCH_KEY} & present)}
    for axis in sorted(axes & present):
        yield axis, None
    for key in sorted(present - axes - _UNDRAWN):
        family = key.split("/", 1)[0]
        if "/" in key and family in _STEP_PREFIXES:
            yield f"{family}/*", STEP_KEY  # a second rule for one of its keys would be taken or not at random
        elif key in own:
            yield key, own[key]
        elif match := _WITH_EPOCH.fullmatch(key):
            yield f"{match[1]}_epoch_*", STEP_KEY
        else:
            yield key, EPOCH_KEY if family == "data" and EPOCH_KEY in present else STEP_KEY
