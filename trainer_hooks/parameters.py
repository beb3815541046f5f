"""The table of parameters: what the metrics call each of them, and which share of it this rank holds.

Names are the model's own, without what wrappers put in front. A wrapper is known by its type, never by a piece of text:
a module that happens to be called ``module`` keeps its name (docs/metrics.md, ``gradients/``).
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from sidestep.trainer_hooks.meshes import (
    copy_dimension,
    holds_first,
    is_distributed,
    is_partial,
    largest_mesh,
    mesh_shape,
)
from sidestep.trainer_hooks.reductions.gradients import LocalGradient

ROOT = "root"
"""The module of parameters that belong to no child."""

DOMINANT_SHARE = 0.9
"""A child that holds more of the parameters than this is looked into instead of being shown as one module."""

# Where a wrapper's type is defined, its name, and the attribute that holds what it wraps. Looked up among what is
# already imported: of a type that nobody has imported there is no instance.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what is inside all wrappers around a module."""
    inner = _inside(module)
    while inner is not None:
        module, inner = inner, _inside(inner)
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    for home, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(home), name, None)
        if isinstance(wrapper, type) and isinstance(module, wrapper):
            inner = getattr(module, attribute)
            return inner if isinstance(inner, nn.Module) else None
    return None


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter once, by the first of its names, wrappers anywhere in the tree left out of the name."""
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
        module = unwrapped(module)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + name, parameter
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    yield from walk(model, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRow:
    """One row of the table ``parameters``."""

    name: str
    """Full dotted name."""
    module: int
    """Number of its module."""
    param: str
    """The rest of the name, as metrics spell it; no two rows of a module share it."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: tuple[int, ...]
    """Where this rank's share begins in it."""
    local_shape: tuple[int, ...]
    """Of this rank's share."""
    trainable: bool
    group: int
    """Index of its parameter group; -1: the optimizer does not know it."""
    is_first: bool = True
    """Whether no rank before this one, within its copy of the model, holds the same share."""


class HeldGradients(NamedTuple):
    """What a look at the gradients of now has found."""

    held: list[LocalGradient]
    without: list[int]
    """Rows of trainable parameters that have none."""
    partial: list[int]
    """Rows whose gradient is a term of a sum over ranks, or lies where this rank's share is not: no values here."""


class ParameterTable:
    """The rows, and the parameters behind them, which are not kept alive."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None = None, modules: Mapping[str, str] | None = None
    ) -> None:
        """Read the model as it is now.

        Args:
            model: with or without wrappers; sharding that comes later is another table.
            optimizer: its groups are the rows' groups.
            modules: prefix of a name to module, the adapter's own division; the longest prefix counts.
        """
        named = list(named_parameters(model))
        sizes = {name: parameter.numel() for name, parameter in named}
        path = _descended(sizes)
        placed = [_placed(name, modules or {}, path) for name, _ in named]
        params = _spelled(placed)
        groups = _groups(optimizer)
        self.modules: tuple[str, ...] = tuple(dict.fromkeys(module for module, _ in placed))
        numbers = {module: number for number, module in enumerate(self.modules)}
        mesh = mesh_shape(largest_mesh(model))
        copies = copy_dimension(model) if mesh is not None else None
        self.rows: tuple[ParameterRow, ...] = tuple(
            _row(
                name,
                parameter,
                numbers[module],
                param,
                groups.get(id(parameter), -1),
                is_first=holds_first(parameter, mesh, copies),
            )
            for (name, parameter), (module, _), param in zip(named, placed, params, strict=True)
        )
        self._parameters = tuple(weakref.ref(parameter) for _, parameter in named)
        self._row_of = {id(parameter): row for row, (_, parameter) in enumerate(named)}

    def as_json(self) -> dict[str, Any]:
        """Return the table as it travels (docs/wire_protocol.md, ``parameters``)."""
        return {"modules": list(self.modules), "parameters": [_as_json(row) for row in self.rows]}

    def module_of(self, parameter: Tensor) -> str | None:
        """Return the module of a parameter, None for one that is not the model's."""
        row = self._row_of.get(id(parameter))
        if row is None or self._parameters[row]() is not parameter:
            return None
        return self.modules[self.rows[row].module]

    def gradients(self) -> HeldGradients:
        """Return this step's gradients: those held here, the missing ones, and those that no rank has."""
        found = HeldGradients([], [], [])
        for number, (row, reference) in enumerate(zip(self.rows, self._parameters, strict=True)):
            parameter = reference()
            if parameter is None or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                found.without.append(number)
                continue
            gradient = _own_share(parameter.grad, parameter, row)
            if gradient is None:
                found.partial.append(number)
            else:
                found.held.append(LocalGradient(number, row.module, gradient, row.is_first))
        return found

    def weights(self) -> list[tuple[int, Tensor]]:
        """Return module and parameter of all that is trained, of shares those that no rank before this one holds."""
        held = zip(self.rows, (reference() for reference in self._parameters), strict=True)
        return [
            (row.module, parameter)
            for row, parameter in held
            if parameter is not None and parameter.requires_grad and parameter.is_floating_point() and row.is_first
        ]

    def places(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Return name, offset and local shape of each row: what the worker knows it by."""
        return [(row.name, row.offset, row.local_shape) for row in self.rows]

    def holds_shares(self) -> bool:
        """Tell whether it is one of shares, all of which somebody still keeps."""
        is_of_shares = any(row.local_shape != row.shape for row in self.rows)
        return is_of_shares and all(reference() is not None for reference in self._parameters)

    def fits(self, model: nn.Module) -> bool:
        """Tell whether the model still has these parameters, as trainable as they were."""
        now = [(id(parameter), name, parameter.requires_grad) for name, parameter in named_parameters(model)]
        return now == [(key, row.name, row.trainable) for key, row in zip(self._row_of, self.rows, strict=True)]


def _descended(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the path down which one child after the other holds nearly all parameters."""
    path: tuple[str, ...] = ()
    total = sum(sizes.values())
    while True:
        shares: Counter[str] = Counter()
        for name, size in sizes.items():
            parts = name.split(".")
            if len(parts) > len(path) + 1 and tuple(parts[: len(path)]) == path:
                shares[parts[len(path)]] += size
        child, share = shares.most_common(1)[0] if shares else ("", 0)
        if share <= DOMINANT_SHARE * total or not share:
            return path
        # A single block of its own has nothing to divide: the parameters of one layer are not modules.
        below = {tuple(name.split("."))[len(path) + 1] for name in sizes if _is_below(name, (*path, child))}
        if not any(_is_below(name, (*path, child, part)) for part in below for name in sizes):
            return path
        path = (*path, child)


def _is_below(name: str, path: tuple[str, ...]) -> bool:
    parts = tuple(name.split("."))
    return len(parts) > len(path) and parts[: len(path)] == path


def _placed(name: str, prefixes: Mapping[str, str], path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return a parameter's module, and what of its name is left."""
    parts = tuple(name.split("."))
    fitting = [prefix for prefix in prefixes if _is_below(name, tuple(prefix.split(".")))]
    if fitting:
        longest = max(fitting, key=len)
        return prefixes[longest], parts[longest.count(".") + 1 :]
    depth = next(
        (depth for depth, part in enumerate(path) if depth >= len(parts) - 1 or parts[depth] != part), len(path)
    )
    if len(parts) == 1:
        return ROOT, parts
    if len(parts) == depth + 1:  # directly on a module that was looked into
        return _label(parts[:depth]), parts[depth:]
    return _label(parts[: depth + 1]), parts[depth + 1 :]


def _label(parts: tuple[str, ...]) -> str:
    """Return the last component, with the one before it where it is a bare number."""
    return "_".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


def _spelled(placed: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
    """Spell the rests of the names with one underscore for a dot; with two where that would be ambiguous."""
    plain = [(module, "_".join(rest)) for module, rest in placed]
    often = Counter(plain)
    spelled: list[str] = []
    used: set[tuple[str, str]] = set()
    for (module, rest), key in zip(placed, plain, strict=True):
        text = key[1] if often[key] == 1 else "__".join(rest)
        while (module, text) in used:  # a name that itself holds underscores
            text += "_"
        used.add((module, text))
        spelled.append(text)
    return spelled


def _groups(optimizer: Optimizer | None) -> dict[int, int]:
    if optimizer is None:
        return {}
    return {id(each): index for index, group in enumerate(optimizer.param_groups) for each in group["params"]}


def _row(name: str, parameter: nn.Parameter, module: int, param: str, group: int, *, is_first: bool) -> ParameterRow:
    shape = tuple(parameter.shape)
    local_shape, offset = share_of(parameter)
    return ParameterRow(
        name=name,
        module=module,
        param=param,
        shape=shape,
        offset=offset,
        local_shape=local_shape,
        trainable=parameter.requires_grad,
        group=group,
        is_first=is_first,
    )


def share_of(parameter: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and offset of this rank's share; of a DTensor what its mesh and placements say."""
    shape = tuple(int(size) for size in parameter.shape)
    if not is_distributed(parameter):
        return shape, (0,) * len(shape)
    # Imported here: torch without distributed has no such module, and then no DTensor either.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    local, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    return tuple(int(size) for size in local), tuple(int(place) for place in offset)


def _own_share(gradient: Any, parameter: Any, row: ParameterRow) -> Tensor | None:
    """Return the gradient of this rank's share of a parameter; None where the rank does not have it.

    A gradient can lie otherwise than its parameter: that of an embedding cut by rows may be whole on every rank. Then
    the share is cut out of the local values.
    """
    if not is_distributed(gradient):
        whole: Tensor = gradient
        return whole if not is_distributed(parameter) else None
    if is_partial(gradient):
        return None
    local: Tensor = gradient.to_local()
    if is_distributed(parameter) and gradient.placements == parameter.placements:
        return local
    _, begins = share_of(gradient)
    for axis, (begin, own, size) in enumerate(zip(begins, row.offset, row.local_shape, strict=True)):
        start = own - begin if size else 0
        if start < 0 or start + size > local.shape[axis]:
            return None
        local = local.narrow(axis, start, size)
    return local


def _as_json(row: ParameterRow) -> dict[str, Any]:
    numel = 1
    for size in row.shape:
        numel *= size
    table = {
        "name": row.name,
        "module": row.module,
        "param": row.param,
        "shape": list(row.shape),
        "numel": numel,
        "offset": list(row.offset),
        "local_shape": list(row.local_shape),
        "trainable": row.trainable,
        "group": row.group,
    }
    return table if row.is_first else {**table, "first": False}
