"""Mistakes that can be told before the first step: each raises at attach, and says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.topology import Topology


def checked_optimizer(optimizer: Any, model: nn.Module) -> Any:
    """The torch optimizer that steps, from beneath wrappers such as Accelerate's.

    Raises:
        TypeError: no optimizer with step hooks can be found.
        ValueError: it has no parameters, or none of the model's.
    """
    while not hasattr(optimizer, "register_step_pre_hook") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "register_step_pre_hook") or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held:
        raise ValueError("optimizer has no parameters: attach after its parameter groups are filled")
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            "optimizer holds none of the model's parameters: pass the model that it trains, and make the optimizer after "
            "wrapping or sharding the model"
        )
    return optimizer


def check_arguments(
    model: object,
    config: object,
    *,
    step: object,
    samples: object,
    tokenizer: object,
    generate_fn: object,
    scaler: object,
    modules: object,
    names: Mapping[str, object],
) -> None:
    """Hold each argument of ``attach`` against what it must be.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a wrong value, or goes without another that it needs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(config, HooksConfig):
        raise TypeError(
            f"config must be a HooksConfig, not {type(config).__name__}; HooksConfig.from_train_config(cfg) makes one of a "
            "trainer's configuration"
        )
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be the number of the next optimizer step, not {step!r}")
    if step < 0:
        raise ValueError(f"step must be at least 0, not {step}")
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be text, not {type(value).__name__}")
    if samples is not None and tokenizer is None:
        raise ValueError("samples need a tokenizer, by which generations are shown as text: pass tokenizer=")
    if generate_fn is not None and not callable(generate_fn):
        raise TypeError("generate_fn must be callable as generate_fn(model, samples, max_new_tokens)")
    if generate_fn is not None and samples is None:
        raise ValueError("generate_fn needs samples to generate from: pass samples=")
    if scaler is not None and not hasattr(scaler, "is_enabled"):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")
    if modules is not None and not _is_text_map(modules):
        raise TypeError("modules must map prefixes of parameter names to module names")


def _is_text_map(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


def check_topology(topology: Topology) -> None:
    """Refuse a model that is not wrapped where there are several ranks.

    Raises:
        ValueError: a process group of several ranks, and neither DDP nor sharded parameters.
    """
    if topology.world_size > 1 and topology.wrapper == "none":
        raise ValueError(
            f"attach() was called on a bare model among {topology.world_size} ranks: wrap it first "
            "(DistributedDataParallel, fully_shard), then attach to the wrapped model"
        )
