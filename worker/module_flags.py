"""What the table ``parameters`` says of each module: whether it is trained, and whether it is of the image's side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from sidestep.protocol.messages import Json

TRAINABLE: Final = 1
VISUAL: Final = 2
_VISUAL_NAME: Final = re.compile(
    r"vis|image|img|pixel|patch|project|connector|siglip|clip|vit|mm_|resampler|(^|[._])mp([._]|$)", re.IGNORECASE
)


def module_names(table: Mapping[str, Json]) -> list[str]:
    """Return the modules of the table, in its order."""
    names = table.get("modules")
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def module_flags(table: Mapping[str, Json]) -> tuple[int, ...]:
    """Return ``TRAINABLE | VISUAL`` of each module of the table, as far as it holds."""
    names = module_names(table)
    trainable = _trainable(table, len(names))
    return tuple(
        (TRAINABLE if is_trained else 0) | (VISUAL if _VISUAL_NAME.search(name) else 0)
        for name, is_trained in zip(names, trainable, strict=True)
    )


def _trainable(table: Mapping[str, Json], num_modules: int) -> list[bool]:
    """Whether any parameter of a module is trainable, by the table."""
    found = [False] * num_modules
    rows = table.get("parameters")
    for row in rows if isinstance(rows, list | tuple) else ():
        place = row.get("module") if isinstance(row, Mapping) else None
        if isinstance(place, int) and 0 <= place < num_modules and row.get("trainable", True):
            found[place] = True
    return found
