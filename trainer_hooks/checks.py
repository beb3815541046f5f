"""Mistakes that can be told before the first step: each raises at attach, and says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.samples import Sample
from sidestep.trainer_hooks.topology import Topology


def checked_optimizer(optimizer: Any, model: nn.Module) -> Any:
    """The torch optimizer that steps, from beneath wrappers such as Accelerate's.

    Raises:
        TypeError: no optimizer with step hooks can be found.
        ValueError: it has no parameters, or none of the model's.
    """
    while not _takes_step_hooks(optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "register_step_pre_hook") or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held:
        raise ValueError("optimizer has no parameters: attach after its parameter groups are filled")
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            "optimizer holds none of the model's parameters: pass the model that it trains, and make the optimizer "
            "after wrapping or sharding the model"
        )
    return optimizer


def check_arguments(
    model: object,
    config: object,
    *,
    step: object,
    scaler: object,
    modules: object,
    texts: Mapping[str, object],
    tags: object,
) -> None:
    """Hold each argument of ``attach`` against what it must be.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a step below 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(config, HooksConfig):
        raise TypeError(
            f"config must be a HooksConfig, not {type(config).__name__}; HooksConfig.from_train_config(cfg) makes one "
            "of a trainer's configuration"
        )
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be the number of the next optimizer step, not {step!r}")
    if step < 0:
        raise ValueError(f"step must be at least 0, not {step}")
    if scaler is not None and not hasattr(scaler, "is_enabled"):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")
    if modules is not None and not _is_text_map(modules):
        raise TypeError("modules must map prefixes of parameter names to module names")
    _check_texts(texts, tags)


def _check_texts(texts: Mapping[str, object], tags: object) -> None:
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be text, not {type(value).__name__}")
    if isinstance(tags, str) or not isinstance(tags, Iterable) or not all(isinstance(tag, str) for tag in tags):
        raise TypeError(f"tags must be a list of texts, not {tags!r}")


def check_generation(samples: object, tokenizer: object, generate_fn: object) -> None:
    """Hold what generation needs together.

    Raises:
        TypeError: ``generate_fn`` cannot be called.
        ValueError: samples without a tokenizer, or a way to generate without samples.
    """
    if samples is not None and tokenizer is None:
        raise ValueError("samples need a tokenizer, by which generations are shown as text: pass tokenizer=")
    if generate_fn is not None and not callable(generate_fn):
        raise TypeError("generate_fn must be callable as generate_fn(model, samples, max_new_tokens)")
    if generate_fn is not None and samples is None:
        raise ValueError("generate_fn needs samples to generate from: pass samples=")


def check_samples(samples: Iterable[object]) -> list[Sample]:
    """Samples as a list.

    Raises:
        TypeError: one of them is no ``Sample``.
        ValueError: there are none.
    """
    listed: list[Sample] = []
    for sample in samples:
        if not isinstance(sample, Sample):
            raise TypeError(
                f"samples must be sidestep.Sample objects, not {type(sample).__name__}; "
                "sidestep.trainer_hooks.samples.samples_from_dataset makes them of a dataset"
            )
        listed.append(sample)
    if not listed:
        raise ValueError("samples is empty: pass some, or leave it out for a run without generation")
    return listed


def _takes_step_hooks(optimizer: object) -> bool:
    """Whether hooks can be put on it: Accelerate's wrapper has torch's class and methods, and never called its init."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return hasattr(optimizer, "_optimizer_step_pre_hooks")
    return hasattr(optimizer, "register_step_pre_hook")


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
