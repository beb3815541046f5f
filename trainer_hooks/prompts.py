"""Samples as one batch: left-padded, masked, prepared once and kept on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from sidestep.trainer_hooks.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """A batch of prompts."""

    input_ids: torch.Tensor
    """int64 [n, t], padded on the left."""
    attention_mask: torch.Tensor
    """int64 [n, t], 0 at padding."""
    inputs: Mapping[str, Any]
    """The samples' further inputs, joined."""

    @classmethod
    def joined(cls, samples: Sequence[Sample], pad_id: int) -> Self:
        """Join samples that have their prompt ids."""
        prompts = [sample.prompt() for sample in samples]
        longest = max(map(len, prompts))
        ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        names = dict.fromkeys(name for sample in samples for name in sample.inputs)
        inputs = {name: _join(name, [sample.inputs.get(name) for sample in samples]) for name in names}
        return cls(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), inputs=inputs)

    def on(self, device: torch.device, dtype: torch.dtype | None) -> Self:
        """The same on a device; floating-point inputs in ``dtype`` where one is given."""
        return type(self)(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            inputs={name: _moved(value, device, dtype) for name, value in self.inputs.items()},
        )

    def arguments(self, names: Sequence[str], required: frozenset[str]) -> dict[str, Any]:
        """Keyword arguments for a forward or generate with these argument names; ids and mask come with them."""
        given: dict[str, Any] = {ids_name(names): self.input_ids, **self.inputs}
        if "attention_mask" in names:
            given["attention_mask"] = self.attention_mask
        if "images" in required and "images" not in given:
            given["images"] = [[] for _ in range(len(self.input_ids))]  # nanoVLM: text without an image
        return given


def ids_name(names: Sequence[str]) -> str:
    """What a forward calls its token ids."""
    return "input_ids" if "input_ids" in names or not names else names[0]


def _join(name: str, values: list[Any]) -> Any:
    present = [value for value in values if value is not None]
    if all(isinstance(value, torch.Tensor) for value in present):
        return torch.cat([value.detach().cpu() for value in present])
    if all(isinstance(value, list | tuple) for value in present):
        return [list(value) if value is not None else [] for value in values]
    if any(isinstance(value, torch.Tensor | list | tuple) for value in present) or any(
        v != present[0] for v in present
    ):
        raise ValueError(f"Sample.inputs[{name!r}] differs between samples in a way that no batch can hold")
    return present[0]


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, list):
        return [_moved(item, device, dtype) for item in value]
    return value
