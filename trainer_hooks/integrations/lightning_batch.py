"""Ids, labels and mask of a batch, found by the names that people give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_LABELS = {"shift_labels": True, "targets": True, "target": True, "labels": None}
"""Names of labels in a batch, and whether they say that ``labels[t]`` is the target of position t."""


def complete(told: dict[str, Any], batch: Mapping[Any, Any]) -> None:
    """Add what the forward was not given: ids, labels and mask of the batch, where their shapes fit."""
    ids = told["input_ids"]
    if ids is None and told.get("encoder_ids") is None:  # else the batch's ids are not those of the labels
        ids = told["input_ids"] = _integers(batch.get("input_ids"))
    if told["labels"] is None:
        name = next((name for name in _LABELS if _integers(batch.get(name)) is not None), "")
        labels = _integers(batch.get(name))
        if labels is not None and (ids is None or labels.shape == ids.shape):
            told["labels"], told["shifted"] = labels, _LABELS[name]
    mask = batch.get("attention_mask")
    if told["attention_mask"] is None and ids is not None and getattr(mask, "shape", None) == ids.shape:
        told["attention_mask"] = mask


def _integers(value: Any) -> torch.Tensor | None:
    """Ids or labels [b, t], or None."""
    fits = isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()
    return value if fits else None
