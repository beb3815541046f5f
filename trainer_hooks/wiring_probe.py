"""How the model is wired: what its losses depend on, told by changing what they must not, or must, depend on.

One micro-batch is looked at as it is, with the later answer tokens of every second row exchanged (a causal mask that is
lost; rows that see each other), with other ids at padding (a mask that is not applied), and with each image in
another's place (images that reach no answer). Such faults stand from the first step, where no past is there to compare
with. What must not change does not change to the last bit (docs/detection.md). It costs three to six forwards on its
own interval (the first time two more), on rank 0, in the mode that is trained in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.protocol.messages import Message, Probe
from sidestep.trainer_hooks.capture import Batch, ForwardReader, ids_argument, mask_argument
from sidestep.trainer_hooks.image_probe import last_replaced, rolled, rolled_rows, rolled_tiles
from sidestep.trainer_hooks.isolation import Autocast, as_trained, autocast_now
from sidestep.trainer_hooks.kept_batch import KeptBatch, Ran, forward_logits
from sidestep.trainer_hooks.parameters import unwrapped
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.cross_entropy import cross_entropy
from sidestep.trainer_hooks.wiring_changes import (
    Answers,
    Change,
    every_second,
    find_answers,
    largest_change,
    mean_change,
    median_largest_change,
    nothing,
    spares_rows,
)

FIRST_STEP = 10
"""Probed whatever the interval is: what is wired wrongly from the start is found at once."""
NOISE_FACTOR = 4.0
"""Of the change between two equal forwards, taken off: where a kernel adds in another order each time, it is not 0."""
FIRST_REPEATS = 3
"""Equal forwards at the first probe; later one. Where layers are left out by chance, two may be equal by chance."""
RANDOM_NATS = 1e-3
"""Largest change of a loss between equal forwards from which it is no order of additions, but chance."""
MIN_LOSS = 1e-3
"""Nats: an answer that is more certain may cost the same with every image."""
MAX_FAILURES = 3
"""Exceptions after which it is switched off."""

PARTS = ("future", "apart", "padding", "image", "last_image", "misplaced")
"""What is looked at, as the fields of ``Probe`` are named."""


@dataclass(frozen=True, slots=True)
class Look:
    """A micro-batch as it is."""

    given: Mapping[str, Any]
    ids: str
    """The argument that holds its ids."""
    aligned: AlignedBatch
    answers: Answers
    plain: Tensor
    """Losses at the candidates, float32 [b, k]."""
    counted: Tensor
    """Which of them count, bool [b, k]."""

    @property
    def untouched(self) -> Tensor:
        """Those that count in rows that stay as they are, bool [b, k]."""
        chosen = every_second(self.answers.input_ids).narrow(0, 0, self.counted.shape[0]).to(self.counted.device)
        return self.counted & chosen.logical_not().unsqueeze(1)


class WiringProbe:
    """Keeps one micro-batch of a due step until the step has ended, and looks at it a few times."""

    name = "wiring_probe"

    def __init__(
        self, model: nn.Module, reader: ForwardReader, interval: int, *, image_token_id: int | None = None
    ) -> None:
        """Probe ``FIRST_STEP`` steps after the first one and at half of every ``interval`` steps; 0: never."""
        self._model = unwrapped(model)
        self._reader = reader
        self._began: int | None = None
        self._interval = interval
        self._image_token_id = image_token_id
        self._kept = KeptBatch()
        self._autocast: Autocast = ()
        self._failures = 0
        self._left_out: set[str] = set()
        self._without_labels = False
        self._noise: Tensor | None = None
        self._is_random: Tensor | None = None
        config = getattr(self._model, "config", None)
        if getattr(config, "is_encoder_decoder", False) is True:
            self._interval = 0  # every position of an encoder sees all others, as it should

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is probed: soon after the first one, that of a start or of a resume, and at intervals."""
        interval = self._interval
        if self._began is None:
            self._began = step
        return interval > 0 and step > 0 and (step == self._began + FIRST_STEP or step % interval == interval // 2)

    def see(self, given: Mapping[str, Any]) -> None:
        """Keep the arguments of a due step's first forward that has token ids."""
        if self._kept.is_empty and ids_argument(given) is not None:
            self._kept.see(given)
            self._autocast = autocast_now(self._model)

    def keep(self, batch: Batch, align: Callable[[Batch], AlignedBatch]) -> None:
        """Take the labels that belong to what was seen."""
        self._kept.keep(batch, align)

    def run(self, step: int) -> Ran | None:
        """Look at what was kept, and let go of it; None where nothing was, or it can tell nothing.

        Raises:
            Exception: whatever the model's forward raises; after ``MAX_FAILURES`` of them no step is due any more.
        """
        taken = self._kept.take()
        if taken is None:
            return None
        try:
            return self._run(step, *taken)
        except Exception:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                self._interval = 0
            raise

    def _run(self, step: int, given: dict[str, Any], aligned: AlignedBatch) -> Ran | None:
        began = time.perf_counter()
        ids = ids_argument(given)
        answers = find_answers(given[ids], aligned, self._image_token_id) if ids is not None else None
        if ids is None or answers is None:
            return None
        plain = self._losses(given, aligned, answers)
        if plain is None:
            self._interval = 0  # no logits in any way: nothing can be told of this model
            return None
        counted = answers.counted.to(plain.device) & plain.isfinite()
        look = Look(given, ids, aligned, answers, plain, counted)
        found = self._exchanged(look)
        asked = (("padding", self._padding), ("image", self._images), ("last_image", self._last_images))
        for part, ask in asked:
            for name, change in self._optional(step, part, ask, look).items():
                found[name] = found[name].or_larger(change)
        rows = torch.stack([found[part].rows for part in PARTS])
        if self._is_random is not None:
            rows = torch.where(self._is_random, 0, rows)
        tensors = {"changes": torch.stack([found[part].nats.to(torch.float32) for part in PARTS]), "rows": rows}
        seconds = time.perf_counter() - began

        def finish(arrays: Mapping[str, Any]) -> Sequence[Message]:
            values: dict[str, Any] = {}
            for part, change, rows in zip(PARTS, arrays["changes"], arrays["rows"], strict=True):
                values.update({f"{part}_change": float(change), f"{part}_rows": int(rows)})
            return (Probe(step=step, loss=nan, rolled_loss=nan, labelled=0, images=0, seconds=seconds, **values),)

        return tensors, finish

    def _exchanged(self, look: Look) -> dict[str, Change]:
        """Exchange later answer tokens of every second row: what stands before them, and the other rows, must stay."""
        answers, plain = look.answers, look.plain
        best = torch.where(look.counted, plain, -1.0).argmax(dim=1, keepdim=True)
        position = answers.candidates.gather(1, best.to(answers.candidates.device))
        other, is_exchanged = answers.exchanged(position, every_second(answers.input_ids))
        is_exchanged = is_exchanged.to(plain.device)
        changed = self._again(look, {look.ids: other})
        before = look.counted.gather(1, best) & is_exchanged.unsqueeze(1)
        self._measure_noise(look, best, before)
        return {
            "future": mean_change(plain.gather(1, best), changed.gather(1, best), before, self._noise),
            "apart": mean_change(plain, changed, look.untouched & is_exchanged.any(), self._noise),
            **dict.fromkeys(PARTS[2:], nothing(plain.device)),
        }

    def _measure_noise(self, look: Look, best: Tensor, before: Tensor) -> None:
        """See by how much equal forwards differ; a model that draws numbers of its own tells nothing of its wiring."""
        plain = look.plain
        for _ in range(FIRST_REPEATS if self._noise is None else 1):
            same = self._again(look, {})
            at_best = mean_change(plain.gather(1, best), same.gather(1, best), before).nats
            noise = NOISE_FACTOR * torch.maximum(at_best, mean_change(plain, same, look.counted).nats)
            is_random = largest_change(plain, same, look.counted).nats > RANDOM_NATS
            self._noise = noise if self._noise is None else torch.maximum(self._noise, noise)
            self._is_random = is_random if self._is_random is None else self._is_random | is_random

    def _optional(
        self, step: int, part: str, ask: Callable[[Look], dict[str, Change]], look: Look
    ) -> dict[str, Change]:
        """Ask for a part; one at which the model raises is left out of all later probes."""
        try:
            return ask(look) if part not in self._left_out else {}
        except Exception:
            self._left_out.add(part)
            self._began = step  # soon again, without it
            raise

    def _padding(self, look: Look) -> dict[str, Change]:
        """Put other ids where the attention mask is 0: no loss may change."""
        ids = look.answers.input_ids
        mask = mask_argument(look.given, ids.shape)
        if mask is None or (ids.is_cpu and not mask.is_cpu):
            return {}
        other, is_replaced = look.answers.unpadded(mask.to(ids.device, non_blocking=True))
        counted = look.counted & is_replaced.to(look.plain.device).unsqueeze(1)
        return {"padding": mean_change(look.plain, self._again(look, {look.ids: other}), counted, self._noise)}

    def _images(self, look: Look) -> dict[str, Change]:
        """Put images in the place of others: some loss must change, of every second row alone where that is known."""
        plain, answers = look.plain, look.answers
        by_rows = rolled_rows(look.given, answers.input_ids.shape[0]) if spares_rows(answers.input_ids) else None
        moved = by_rows or rolled(look.given) or rolled_tiles(look.given)
        if moved is None:
            return {}
        differ = (moved[1] > 0).to(plain.device, non_blocking=True)
        changed = self._again(look, moved[0])
        behind = look.counted & answers.behind_images.to(plain.device) & (plain > MIN_LOSS)
        found = {"image": largest_change(plain, changed, behind & differ)}
        if by_rows is not None:
            is_known = answers.has_images_by_rows(by_rows[2]).to(plain.device)
            found["apart"] = mean_change(plain, changed, look.untouched & differ & is_known, self._noise)
        return found

    def _last_images(self, look: Look) -> dict[str, Change]:
        """Replace the last image of each row alone: what stands before it must stay, and what is behind must change."""
        plain, answers = look.plain, look.answers
        if answers.image_token_id is None:
            return {}
        made = last_replaced(look.given, answers.input_ids.shape[0])
        if made is None:
            return {}
        is_known = answers.has_images_by_rows(made.tiles).to(plain.device)
        differs = made.differs.narrow(0, 0, plain.shape[0]).to(plain.device, non_blocking=True).unsqueeze(1)
        before, behind = (each.to(plain.device) for each in answers.around_last_image(made.tiles, made.last_tiles))
        counted = look.counted & differs & is_known
        changed = self._again(look, made.given)
        return {
            "last_image": median_largest_change(plain, changed, counted & behind & (plain > MIN_LOSS)),
            "misplaced": mean_change(plain, changed, counted & before, self._noise),
        }

    def _again(self, look: Look, other: Mapping[str, Any]) -> Tensor:
        made = self._losses({**look.given, **other}, look.aligned, look.answers)
        if made is None:
            raise ValueError("a second forward shows no logits, though the first one did")
        return made

    def _losses(self, given: Mapping[str, Any], aligned: AlignedBatch, answers: Answers) -> Tensor | None:
        """Return the losses at the candidates, float32 [b, k]; None where there are no logits.

        A fused loss has no logits while there are labels: then it is asked without them.
        """
        labels = self._reader.label_argument
        if self._without_labels:
            given = {name: value for name, value in given.items() if name != labels}
        with as_trained(self._model, self._autocast):
            source = forward_logits(self._model, self._reader, given, aligned)
        if source is None:
            if self._without_labels or labels not in given:
                return None
            self._without_labels = True
            return self._losses(given, aligned, answers)
        positions = answers.candidates
        targets = answers.targets.narrow(0, 0, positions.shape[0]).gather(1, positions)
        rows = torch.arange(positions.shape[0], device=source.device).unsqueeze(1).expand(positions.shape)
        here = positions.to(source.device)
        wanted = targets.to(source.device, torch.int64)
        return cross_entropy(source, rows.flatten(), here.flatten(), wanted.flatten()).view(positions.shape)
