"""The layer that turns hidden states into logits, by which the two are told apart."""

from __future__ import annotations

import inspect

import torch
from torch import nn

_PLACES = ("decoder.head", "lm_head", "language_model.lm_head", "head", "output", "embed_out")


def find_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of an unwrapped model: what ``get_output_embeddings`` says, else one of the usual names."""
    ask = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        told = ask()
        if isinstance(told, nn.Module):
            return told
    for place in _PLACES:
        found: object = model
        for name in place.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.Module) and head_sizes(found) is not None:
            return found
    return None


def head_sizes(head: nn.Module | None) -> tuple[int, int] | None:
    """(vocabulary, width) of a head, or None where it has no matrix."""
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def parameter_names(function: object) -> tuple[str, ...]:
    """The names of a callable's arguments in order, without ``*args`` and ``**kwargs``; empty where unknown."""
    if not callable(function):
        return ()
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()  # a builtin without a signature names nothing
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind not in kinds)


def required_names(function: object) -> frozenset[str]:
    """The names of a callable's arguments that have no default."""
    if not callable(function):
        return frozenset()
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()  # as above
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in kinds)


def takes_any_keyword(function: object) -> bool:
    """Whether a callable has ``**kwargs``, or does not tell."""
    if not callable(function):
        return False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True  # as above
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
