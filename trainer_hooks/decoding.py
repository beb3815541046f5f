"""Greedy decoding of a batch of prompts, by the way that a model offers (docs/trainer.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from sidestep.trainer_hooks.heads import find_head, head_sizes, parameter_names, required_names
from sidestep.trainer_hooks.prompts import Prompts

_CACHE_NAMES = ("kv_cache", "cache")


class Decoding(Protocol):
    """One way to decode."""

    masked: bool
    """Whether padding can be masked; else prompts go one by one."""
    names: tuple[str, ...]
    """The model's arguments, by which ``Sample.inputs`` are checked; empty where it takes any."""

    def decode(self, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
        """New ids per prompt, not yet cut at EOS."""
        ...


def choose_decoding(model: nn.Module, eos_id: int | None, pad_id: int) -> Decoding | None:
    """The way for an unwrapped model, best first; None where it offers none.

    1. nanoVLM's contract: a ``decoder`` with a key-value cache, a ``token_embedding`` and a ``head``;
    2. transformers' ``generate``; 3. nanoVLM's own ``generate``; 4. the forward alone, where it gives logits.
    """
    decoder = getattr(model, "decoder", None)
    if isinstance(decoder, nn.Module) and _cache_name(decoder) is not None and _has_parts(decoder):
        return CachedLoop(model, decoder, eos_id)
    generate = getattr(model, "generate", None)
    if callable(generate) and hasattr(model, "generation_config"):
        return LibraryGenerate(model, pad_id)
    if callable(generate) and "greedy" in parameter_names(generate):
        return GreedyGenerate(model)
    return RecomputingLoop(model, eos_id) if parameter_names(model.forward) else None


def choose_collective_decoding(model: nn.Module, pad_id: int) -> Decoding | None:
    """The way for a sharded model, of which every rank must call the same forwards; None where it offers none.

    Ways around the model's own forward would miss what gathers its parameters, and one that ends when all rows have
    ended could end earlier on one rank than on another: so transformers' ``generate`` with its own agreement on the
    end, else the forward alone to the longest answer.
    """
    if callable(getattr(model, "generate", None)) and hasattr(model, "generation_config"):
        return LibraryGenerate(model, pad_id, synced=True)
    return RecomputingLoop(model, None) if parameter_names(model.forward) else None


def greedy_loop(
    start: Callable[[], torch.Tensor], advance: Callable[[torch.Tensor], torch.Tensor], eos_id: int | None, limit: int
) -> list[list[int]]:
    """Take the likeliest id of each row until all rows have ended.

    Args:
        start: logits [n, v] after the prompts.
        advance: the chosen ids [n] to the next logits [n, v].
        eos_id: the id that ends a row; None: rows run to the limit.
        limit: most ids a row.
    """
    logits, columns = start(), []
    ended = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    for place in range(limit):
        chosen = logits.argmax(dim=-1)
        columns.append(chosen)
        if eos_id is not None:
            ended |= chosen == eos_id
            if bool(ended.all()):  # a read of the device: generation is the stated exception
                break
        if place + 1 < limit:
            logits = advance(chosen)
    rows: list[list[int]] = torch.stack(columns, dim=1).tolist()
    return rows


class CachedLoop:
    """nanoVLM's contract: the forward gives hidden states, the decoder goes on from its cache.

    The cache of the first pass is seen by a hook on the decoder, put on for that pass alone; so images are embedded by
    the model's own forward, and the ids are those of its greedy ``generate`` up to the first EOS.
    """

    masked = True

    def __init__(self, model: nn.Module, decoder: nn.Module, eos_id: int | None) -> None:
        self._model = model
        self._decoder: Any = decoder
        self._eos_id = eos_id
        self.names = parameter_names(model.forward)
        self._required = required_names(model.forward)
        self._cache_name = _cache_name(decoder) or ""
        self._counts_positions = "start_pos" in parameter_names(decoder.forward)

    def decode(self, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
        """Greedy ids of each prompt."""
        mask = prompts.attention_mask
        seen: list[Any] = []

        def remember(_module: nn.Module, _arguments: Any, output: Any) -> None:
            seen.append(output[1])

        def start() -> torch.Tensor:
            hook = self._decoder.register_forward_hook(remember)
            try:
                hidden = self._model(**prompts.arguments(self.names, self._required))[0]
            finally:
                hook.remove()
            return self._logits(hidden)

        def advance(chosen: torch.Tensor) -> torch.Tensor:
            nonlocal mask
            arguments = {self._cache_name: seen[-1]}
            if self._counts_positions:
                arguments["start_pos"] = mask.shape[1]
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            embedded = self._decoder.token_embedding(chosen[:, None])
            hidden, seen[-1] = self._decoder(embedded, attention_mask=mask, **arguments)
            return self._logits(hidden)

        return greedy_loop(start, advance, self._eos_id, max_new_tokens)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        last: torch.Tensor = hidden[:, -1]
        made: torch.Tensor = last if getattr(self._decoder, "lm_use_tokens", False) else self._decoder.head(last)
        return made


class LibraryGenerate:
    """transformers' ``generate``, greedy."""

    masked = True
    names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, pad_id: int, *, synced: bool = False) -> None:
        self._model: Any = model
        self._pad_id = pad_id
        self._further = {"synced_gpus": True} if synced else {}

    def decode(self, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
        """New ids of each prompt; the prompt is taken off where the model returns it."""
        arguments = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, **prompts.inputs}
        out: torch.Tensor = self._model.generate(
            **arguments,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=self._pad_id,
            **self._further,
        )
        return without_prompt(out, prompts.input_ids, max_new_tokens)


class GreedyGenerate:
    """A model's own ``generate`` with nanoVLM's signature."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        # inference_mode around it would leave inference tensors in the model's caches, and break the next backward
        function: Any = type(model).generate  # type: ignore[attr-defined]  # asked for before it is made
        plain = getattr(function, "__wrapped__", function)
        by_torch = getattr(getattr(function, "__code__", None), "co_filename", "").endswith("_contextlib.py")
        self._generate = plain if by_torch else function
        self.names = parameter_names(self._generate)[1:]
        self._required = required_names(self._generate)
        self.masked = "attention_mask" in self.names

    def decode(self, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
        """New ids of each prompt."""
        arguments = prompts.arguments(self.names, self._required)
        out = self._generate(self._model, **arguments, max_new_tokens=max_new_tokens, greedy=True)
        return without_prompt(out, prompts.input_ids, max_new_tokens)


class RecomputingLoop:
    """The forward alone, over the whole sequence at every token."""

    def __init__(self, model: nn.Module, eos_id: int | None) -> None:
        self._model = model
        self._eos_id = eos_id
        self.names = parameter_names(model.forward)
        self._required = required_names(model.forward)
        self._head = find_head(model)
        self.masked = "attention_mask" in self.names

    def decode(self, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
        """Greedy ids of each prompt.

        Raises:
            TypeError: the forward gives neither logits nor hidden states that the head can take.
        """
        ids, mask = prompts.input_ids, prompts.attention_mask

        def look() -> torch.Tensor:
            now = Prompts(input_ids=ids, attention_mask=mask, inputs=prompts.inputs)
            arguments = now.arguments(self.names, self._required)
            if "position_ids" in self.names:
                arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
            return self._logits(self._model(**arguments))

        def advance(chosen: torch.Tensor) -> torch.Tensor:
            nonlocal ids, mask
            ids = torch.cat((ids, chosen[:, None]), dim=1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            return look()

        return greedy_loop(look, advance, self._eos_id, max_new_tokens)

    def _logits(self, output: Any) -> torch.Tensor:
        named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        first = named if named is not None else next(iter(output)) if isinstance(output, tuple | list) else output
        if not isinstance(first, torch.Tensor) or first.dim() != 3:
            raise TypeError(f"{type(self._model).__name__}.forward gives no logits [n, t, v] to generate from")
        last = first[:, -1]
        sizes = head_sizes(self._head)
        if named is None and sizes is not None and last.shape[-1] == sizes[1] != sizes[0] and self._head is not None:
            last = self._head(last)
        return last


def without_prompt(out: torch.Tensor, prompt_ids: torch.Tensor, max_new_tokens: int) -> list[list[int]]:
    """The new columns of what a ``generate`` returned, whether or not it repeats the prompt."""
    length = prompt_ids.shape[1]
    too_wide = out.shape[1] > max(length - 1, max_new_tokens)
    if too_wide or torch.equal(out[:, :length], prompt_ids):
        out = out[:, length:]
    rows: list[list[int]] = out[:, :max_new_tokens].tolist()
    return rows


def cut(ids: Sequence[int], eos_ids: frozenset[int], max_new_tokens: int) -> list[int]:
    """Ids up to and with the first EOS."""
    kept = [int(i) for i in ids[:max_new_tokens]]
    return next((kept[: place + 1] for place, i in enumerate(kept) if i in eos_ids), kept)


def _cache_name(decoder: nn.Module) -> str | None:
    names = parameter_names(decoder.forward)
    return next((name for name in _CACHE_NAMES if name in names), None)


def _has_parts(decoder: nn.Module) -> bool:
    parts = (getattr(decoder, "token_embedding", None), getattr(decoder, "head", None))
    return all(isinstance(part, nn.Module) for part in parts) and "attention_mask" in parameter_names(decoder.forward)
