"""What a trainer logs under its own names: plain values now, device scalars when their copies arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from sidestep.trainer_hooks.meshes import whole_or_none
from sidestep.trainer_hooks.open_step import LoggedValues

_INT64 = 1 << 63


REDUCTIONS = ("mean", "sum", "min", "max")


def logged_values(
    values: Mapping[str, Any], step: int | None, step_key: str | None, reduce: str | None = None
) -> tuple[LoggedValues, list[str]]:
    """Sort what ``log`` was given; nested maps are flattened with dots, as W&B does.

    Returns:
        The values, and the names of those that are neither number, bool, text nor a tensor of one element; a DTensor
        of which this rank has a part is left out too.

    Raises:
        TypeError: ``values`` is no mapping.
        ValueError: ``reduce`` is none of ``REDUCTIONS``.
    """
    if reduce is not None and reduce not in REDUCTIONS:
        raise ValueError(f"log(reduce=...) takes {', '.join(REDUCTIONS)}, not {reduce!r}")
    if not isinstance(values, Mapping):
        raise TypeError(f"log() takes a mapping of names to values, not {type(values).__name__}")
    plain: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    left_out: list[str] = []
    for name, given in _flattened(values, ""):
        value = whole_or_none(given) if isinstance(given, torch.Tensor) else given
        if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type != "cpu":
            tensors[name] = value.detach().reshape(1).clone()
            continue
        known = _plain(value)
        if known is None:
            left_out.append(name)
        else:
            plain[name] = known
    made = LoggedValues(
        values=plain,
        tensors=tensors,
        step_key=step_key or "",
        key_step=None if step is None else int(step),
        reduce=reduce or "",
    )
    return made, left_out


def _flattened(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> float | int | bool | str | None:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        size = value.numel() if isinstance(value, torch.Tensor) else value.size
        value = value.item() if size == 1 else None
    if isinstance(value, bool | float | str):
        return value if isinstance(value, bool) else float(value) if isinstance(value, float) else str(value)
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else float(value)
    return None
