"""What the model says now: one batched generation that serves the samples table and the collapse rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from sidestep.protocol.messages import Generation
from sidestep.trainer_hooks.collective_generation import CollectiveGenerationError, put_shares_back
from sidestep.trainer_hooks.decoding import Decoding, choose_collective_decoding, choose_decoding, cut
from sidestep.trainer_hooks.heads import takes_any_keyword
from sidestep.trainer_hooks.isolation import undisturbed
from sidestep.trainer_hooks.parameters import unwrapped
from sidestep.trainer_hooks.prompts import Prompts
from sidestep.trainer_hooks.samples import Sample

GenerateFunction = Callable[[nn.Module, Sequence[Sample], int], Sequence[Sequence[int]]]
"""(unwrapped model, samples, most new tokens) to the new ids of each sample."""

_MAX_FAILURE_CHARACTERS = 500


class Generator:
    """Generates from fixed samples, and leaves the training as it was.

    The prompts are joined once, when it is made, and kept on the CPU. It is the one part of the hooks that costs
    forward passes and waits for the device (docs/metrics.md, ``generation/``).

    Args:
        model: as the trainer calls it; wrappers are taken off.
        samples: those to generate from, with their prompt ids.
        eos_id: the id that ends an answer; None: every answer runs to the limit.
        pad_id: what prompts are padded with on the left.
        max_new_tokens: longest answer.
        generate_fn: the caller's own way.
        share: which of how many ranks this is that generate from every so-many-th sample each.
        is_collective: the model is sharded: all ranks generate the same, to a fixed length.

    Raises:
        ValueError: the samples cannot be joined, or the model offers no way to generate.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        *,
        eos_id: int | None,
        pad_id: int | None,
        max_new_tokens: int,
        generate_fn: GenerateFunction | None = None,
        share: tuple[int, int] = (0, 1),
        is_collective: bool = False,
    ) -> None:
        self._model = unwrapped(model)
        self._samples = tuple(samples)
        self.is_collective = is_collective
        """Whether every rank must run it at the same steps."""
        self.is_first = share[0] == 0
        """Whether this rank generates where one rank alone does."""
        self._share = tuple(range(share[0], len(self._samples), share[1]))
        self._max_new_tokens = max_new_tokens
        self._generate_fn = generate_fn
        configured: Any = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
        further = configured if isinstance(configured, list | tuple) else [configured]
        self._eos_ids = frozenset(int(i) for i in (eos_id, *further) if i is not None)
        self._pad_id = next((i for i in (pad_id, eos_id) if i is not None), 0)
        if generate_fn is not None:
            self._decoding = None
        elif is_collective:
            self._decoding = choose_collective_decoding(self._model, self._pad_id)
        else:
            self._decoding = choose_decoding(self._model, eos_id, self._pad_id)
        if generate_fn is None and self._decoding is None:
            raise ValueError("the model offers no way to generate: pass generate_fn=, or no samples")
        if not takes_any_keyword(self._model.forward):
            _check_inputs(self._samples, self._decoding)
        self._single = [Prompts.joined([sample], self._pad_id) for sample in samples] if self._decoding else []
        together = self._decoding is not None and self._decoding.masked
        self._joined = {} if not together else {
            places: Prompts.joined([self._samples[place] for place in places], self._pad_id)
            for places in {tuple(range(len(self._samples))), self._share}
            if places
        }  # fmt: skip

    def run(self, step: int, *, alone: bool = False) -> Generation:
        """Generate for this rank's samples, or ``alone`` for all; one that raises is counted and shown, not raised.

        Raises:
            CollectiveGenerationError: where all ranks generate together, whatever was raised.
        """
        began = time.perf_counter()
        places = tuple(range(len(self._samples))) if alone or self.is_collective else self._share
        with undisturbed(self._model):
            rows, failures = self._by_all_ranks(places) if self.is_collective else self._by_this_rank(places)
        lengths = [len(rows[place]) for place in rows]
        return Generation(
            step=step,
            samples=np.fromiter(rows, np.int32, len(rows)),
            offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64),
            ids=np.array([i for row in rows.values() for i in row], np.int32),
            failed=np.fromiter(failures, np.int32, len(failures)),
            failures=tuple(dict.fromkeys(failures.values())),
            max_new_tokens=self._max_new_tokens,
            seconds=time.perf_counter() - began,
        )

    def _by_all_ranks(self, places: Sequence[int]) -> tuple[dict[int, list[int]], dict[int, str]]:
        try:
            return dict(zip(places, self._all_at_once(places), strict=True)), {}
        except Exception as error:
            raise CollectiveGenerationError(
                f"generation failed on this rank ({type(error).__name__}: {error}). Every forward of a sharded model "
                "is a collective that the others wait in, so this rank cannot go on. Leave it out with "
                "HooksConfig(generate_when_sharded=False)."
            ) from error
        finally:
            put_shares_back(self._model)

    def _by_this_rank(self, places: Sequence[int]) -> tuple[dict[int, list[int]], dict[int, str]]:
        rows: dict[int, list[int]] = {}
        failures: dict[int, str] = {}
        try:
            rows = dict(zip(places, self._all_at_once(places), strict=True)) if places else {}
        except Exception:  # noqa: BLE001  (whatever it was, each sample's own attempt tells it again)
            for place in places:
                try:
                    rows[place] = self._alone(place)
                except Exception as error:  # noqa: BLE001  (counted, and shown in the run)
                    failures[place] = f"{type(error).__name__}: {error}"[:_MAX_FAILURE_CHARACTERS]
        return rows, failures

    def _all_at_once(self, places: Sequence[int]) -> list[list[int]]:
        if self._generate_fn is not None:
            chosen = tuple(self._samples[place] for place in places)
            return self._checked(self._generate_fn(self._model, chosen, self._max_new_tokens), len(chosen))
        joined = self._joined.get(tuple(places))
        return [self._alone(place) for place in places] if joined is None else self._decoded(joined)

    def _alone(self, place: int) -> list[int]:
        if self._generate_fn is not None:
            return self._checked(self._generate_fn(self._model, (self._samples[place],), self._max_new_tokens), 1)[0]
        return self._decoded(self._single[place])[0]

    def _decoded(self, prompts: Prompts) -> list[list[int]]:
        decoding: Decoding | None = self._decoding
        if decoding is None:
            raise TypeError("no way to decode was chosen")
        prompts = prompts.on(*_device_and_dtype(self._model))
        return self._checked(decoding.decode(prompts, self._max_new_tokens), len(prompts.input_ids))

    def _checked(self, rows: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        if len(rows) != count:
            raise ValueError(f"{len(rows)} generations came back for {count} samples")
        return [cut(_listed(row), self._eos_ids, self._max_new_tokens) for row in rows]


def _check_inputs(samples: Sequence[Sample], decoding: Decoding | None) -> None:
    """Refuse inputs that the model has no argument for: every generation would fail.

    Raises:
        ValueError: names the input and what the model takes.
    """
    names = decoding.names if decoding is not None else ()
    unknown = sorted({name for sample in samples for name in sample.inputs} - set(names)) if names else []
    if unknown:
        raise ValueError(f"Sample.inputs has {unknown[0]!r}, but the model takes {', '.join(names)}")


def with_prompts(samples: Sequence[Sample], tokenizer: Any) -> list[Sample]:
    """Samples with prompt ids: those that have none get their question, encoded by the tokenizer.

    A chat template is used where the tokenizer has one.

    Raises:
        ValueError: a sample has inputs or an image but no prompt ids (where would the image's placeholders stand?), or
            the tokenizer cannot encode.
    """
    prepared = []
    for place, sample in enumerate(samples):
        if sample.prompt_ids is not None:
            prepared.append(sample)
            continue
        if sample.inputs or sample.image is not None:
            raise ValueError(
                f"samples[{place}] has an image but no prompt_ids: pass the ids with the image's placeholders, or make "
                "samples with sidestep.trainer_hooks.samples.samples_from_dataset"
            )
        prepared.append(replace(sample, prompt_ids=_encoded(sample.question, tokenizer, place)))
    return prepared


def _encoded(question: str, tokenizer: Any, place: int) -> list[int]:
    template = getattr(tokenizer, "apply_chat_template", None)
    if callable(template) and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": question}]
        encoded = template(turns, add_generation_prompt=True, tokenize=True)
    elif callable(getattr(tokenizer, "encode", None)):
        encoded = tokenizer.encode(question)
    else:
        raise ValueError(f"samples[{place}] has no prompt_ids and the tokenizer has no encode(): pass prompt_ids")
    ids = encoded["input_ids"] if hasattr(encoded, "keys") else getattr(encoded, "ids", encoded)
    if not len(ids):
        raise ValueError(
            f"samples[{place}]: the question encodes to nothing, and a generation needs a token to go on from"
        )
    return [int(i) for i in ids]


def _listed(row: Sequence[int] | torch.Tensor) -> list[int]:
    return [int(i) for i in (row.tolist() if isinstance(row, torch.Tensor) else row)]


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where the model is, and its floating-point type where it has only one."""
    parameters = list(model.parameters())
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    device = parameters[0].device if parameters else torch.device("cpu")
    return device, dtypes.pop() if len(dtypes) == 1 else None
