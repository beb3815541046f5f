"""The table ``parameters`` as its rows: what each number in ``Gradients.parameters`` stands for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidestep.protocol.messages import Json
from sidestep.worker.records import RunContext

_BLOCK = re.compile(r"(?:^|.*?_)\d+(?=_|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRow:
    """One parameter, and which share of it the table's rank holds."""

    name: str
    """Full dotted name, wrappers left out: the same on every rank."""
    module: str
    param: str
    numel: int
    """Elements of the whole parameter."""
    shard: tuple[tuple[int, ...], tuple[int, ...]]
    """Where this rank's share begins and how large it is: replicas have the same."""
    trainable: bool
    is_first: bool = True
    """Whether the rank counts its elements in the module's histogram: it does not where a lower rank holds them too."""

    @property
    def block(self) -> str:
        """``param`` up to its first number (``blocks_3_attn_weight``: ``blocks_3``); all of it where it has none."""
        found = _BLOCK.match(self.param)
        return found.group() if found else self.param


class ParameterTables:
    """The rows of every rank's table, read once."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._read: dict[int, tuple[ParameterRow, ...]] = {}

    def rows(self, rank: int) -> tuple[ParameterRow, ...]:
        """Return the rows that this rank's ``Gradients`` refer to; empty where no usable table is known."""
        table = self._context.parameters_of(rank)
        if id(table) not in self._read:
            self._read[id(table)] = _read_rows(table)
        return self._read[id(table)]

    def holds_shares(self, rank: int) -> bool:
        """Whether this rank says (since the wire 1.2) that it holds one of several shares of the model."""
        shares = self._context.topologies.get(rank, {}).get("shares", 1)
        return isinstance(shares, int) and shares > 1

    def module_names(self, rank: int) -> Sequence[str]:
        """Return the names of the modules, by their number."""
        return _names(self._context.parameters_of(rank).get("modules"))


def _names(value: Json) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list | tuple) else []


def _read_rows(table: Mapping[str, Json]) -> tuple[ParameterRow, ...]:
    """Read a table; one that is not of the documented layout reads as empty, and its parts count as malformed."""
    modules = _names(table.get("modules"))
    try:
        return tuple(_read_row(row, modules) for row in table.get("parameters") or ())
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return ()


def _read_row(row: Mapping[str, Any], modules: Sequence[str]) -> ParameterRow:
    shape = [int(size) for size in row.get("shape", ())]
    return ParameterRow(
        name=str(row["name"]),
        module=modules[int(row["module"])],
        param=str(row["param"]),
        numel=int(row.get("numel", math.prod(shape))),
        shard=(tuple(map(int, row.get("offset") or ())), tuple(map(int, row.get("local_shape") or ()))),
        trainable=bool(row.get("trainable", True)),
        is_first=bool(row.get("first", True)),
    )
