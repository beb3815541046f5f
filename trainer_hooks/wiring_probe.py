"""How the model is wired: what its losses depend on, told by changing what they must not, or must, depend on.

One micro-batch is looked at as it is, with the later answer tokens of every second row exchanged (a causal mask that is
lost; rows that see each other), with other ids at padding (a mask that is not applied), and with each image in
another's place (images that reach no answer). Such faults stand from the first step, where no past is there to compare
with. What must not change does not change to the last bit (docs/detection.md): so a brief look changes several things
at once, in two to four forwards on its own interval, on rank 0, in the mode that is trained in. Only where something
changed that must not, the next step is looked at thoroughly: one forward for each change, and one that changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.protocol.messages import Probe
from sidestep.trainer_hooks.capture import Batch, ForwardReader, has_encoder, ids_argument, mask_argument
from sidestep.trainer_hooks.image_probe import last_replaced, rolled, rolled_rows, rolled_tiles
from sidestep.trainer_hooks.isolation import Autocast, as_trained, autocast_now
from sidestep.trainer_hooks.kept_batch import AskedLogits, KeptBatch, Ran
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

FIRST_STEP = 8
"""Probed whatever the interval is: what is wired wrongly from the start is found at once."""
NOISE_FACTOR = 4.0
"""Of the change between two equal forwards, taken off: where a kernel adds in another order each time, it is not 0."""
FIRST_REPEATS = 3
"""Equal forwards at the first thorough look; later one. Where layers are left out by chance, two may be equal by
chance."""
RANDOM_NATS = 1e-3
"""Largest change of a loss between equal forwards from which it is no order of additions, but chance."""
MIN_LOSS = 1e-3
"""Nats: an answer that is more certain may cost the same with every image."""
MAX_FAILURES = 3
"""Exceptions after which it is switched off."""

PARTS = ("future", "apart", "padding", "image", "last_image", "misplaced")
"""What is looked at, as the fields of ``Probe`` are named."""
MUST_STAY = ("future", "apart", "padding", "misplaced")
"""Those whose losses do not change in a sound model."""


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
        self._began: int | None = None
        self._interval = interval
        self._image_token_id = image_token_id
        self._kept = KeptBatch()
        self._autocast: Autocast = ()
        self._failures = 0
        self._left_out: set[str] = set()
        self._logits = AskedLogits(self._model, reader)
        self._noise: Tensor | None = None
        self._is_random: Tensor | None = None
        # Set on the thread that gets the numbers, when they are on the host; read on the training thread.
        self._is_thorough = False
        self._is_asked_again = False
        if has_encoder(self._model):
            self._interval = 0  # every position of an encoder sees all others, as it should

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is probed: soon after the first one (of a start, of a resume), at intervals, and again."""
        interval = self._interval
        if self._began is None:
            self._began = step
        if interval <= 0 or step <= 0:
            return False
        return self._is_asked_again or step == self._began + FIRST_STEP or step % interval == interval // 2

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
        is_thorough, self._is_asked_again = self._is_thorough, False
        found = self._exchanged(look) if is_thorough else self._exchanged_at_once(step, look)
        asked = (("padding", self._padding), ("image", self._images), ("last_image", self._last_images))
        for part, ask in asked if is_thorough else asked[1:]:
            for name, change in self._optional(step, part, ask, look).items():
                found[name] = found[name].or_larger(change)
        rows = torch.stack([found[part].rows for part in PARTS])
        if self._is_random is not None:
            rows = torch.where(self._is_random, 0, rows)
        tensors = {"changes": torch.stack([found[part].nats.to(torch.float32) for part in PARTS]), "rows": rows}
        if is_thorough and self._noise is not None:
            tensors["noise"] = self._noise.to(torch.float32)
        seconds = time.perf_counter() - began

        return tensors, lambda arrays: (self._told(step, arrays, seconds=seconds, is_thorough=is_thorough),)

    def _told(self, step: int, arrays: Mapping[str, Any], *, seconds: float, is_thorough: bool) -> Probe:
        """Say what was seen, on the thread that gets the numbers; a brief look that saw a change asks for another."""
        changes = {part: float(change) for part, change in zip(PARTS, arrays["changes"], strict=True)}
        rows = {part: int(number) for part, number in zip(PARTS, arrays["rows"], strict=True)}
        if is_thorough:
            self._is_thorough = bool(arrays["noise"])  # else the next look may be a brief one again
        elif any(changes[part] for part in MUST_STAY):
            self._is_thorough = self._is_asked_again = True
            for part in MUST_STAY:  # which of them it was, and whether by chance, the next look tells
                changes[part], rows[part] = 0.0, 0
        told: dict[str, Any] = {f"{part}_change": change for part, change in changes.items()}
        told.update({f"{part}_rows": number for part, number in rows.items()})
        return Probe(step=step, loss=nan, rolled_loss=nan, labelled=0, images=0, seconds=seconds, **told)

    def _exchanged(self, look: Look) -> dict[str, Change]:
        """Exchange later answer tokens of every second row: what stands before them, and the other rows, must stay."""
        best, other, is_exchanged = self._other_ids(look)
        changed = self._again(look, {look.ids: other})
        self._measure_noise(look, best, look.counted.gather(1, best) & is_exchanged.unsqueeze(1))
        return self._compared(look, best, is_exchanged, changed)

    def _exchanged_at_once(self, step: int, look: Look) -> dict[str, Change]:
        """Put other ids at the padding of the same rows as well: nothing before the exchanged tokens may change."""
        best, other, is_exchanged = self._other_ids(look)
        is_padded = None
        if "padding" not in self._left_out and (mask := self._mask(look)) is not None:
            padded, is_padded = look.answers.unpadded(mask)
            chosen = every_second(look.answers.input_ids)
            other = torch.where(chosen.unsqueeze(1) & (padded != look.answers.input_ids), padded, other)
            is_padded = is_padded & chosen.narrow(0, 0, is_padded.shape[0])
        try:
            changed = self._again(look, {look.ids: other})
        except Exception:
            if is_padded is not None:
                self._leave_out("padding", step)
            raise
        found = self._compared(look, best, is_exchanged, changed)
        if is_padded is not None:
            places = look.answers.candidates
            before = (places <= places.gather(1, best.to(places.device))).to(look.plain.device)
            counted = look.counted & before & is_padded.to(look.plain.device).unsqueeze(1)
            found["padding"] = mean_change(look.plain, changed, counted)
        return found

    def _other_ids(self, look: Look) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's candidate with the highest loss [b, 1], ids that are others behind it, and where they are.

        A certain loss does not change anyway.
        """
        answers = look.answers
        best = torch.where(look.counted, look.plain, -1.0).argmax(dim=1, keepdim=True)
        position = answers.candidates.gather(1, best.to(answers.candidates.device))
        other, is_exchanged = answers.exchanged(position, every_second(answers.input_ids))
        return best, other, is_exchanged.to(look.plain.device)

    def _compared(self, look: Look, best: Tensor, is_exchanged: Tensor, changed: Tensor) -> dict[str, Change]:
        plain = look.plain
        before = look.counted.gather(1, best) & is_exchanged.unsqueeze(1)
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
            self._leave_out(part, step)
            raise

    def _leave_out(self, part: str, step: int) -> None:
        self._left_out.add(part)
        self._began = step  # soon again, without it

    def _mask(self, look: Look) -> Tensor | None:
        """Return the attention mask, where its ids lie; None where there is none, or it would have to be waited for."""
        ids = look.answers.input_ids
        mask = mask_argument(look.given, ids.shape)
        if mask is None or (ids.is_cpu and not mask.is_cpu):
            return None
        return mask.to(ids.device, non_blocking=True)

    def _padding(self, look: Look) -> dict[str, Change]:
        """Put other ids where the attention mask is 0: no loss may change."""
        mask = self._mask(look)
        if mask is None:
            return {}
        other, is_replaced = look.answers.unpadded(mask)
        counted = look.counted & is_replaced.to(look.plain.device).unsqueeze(1)
        return {"padding": mean_change(look.plain, self._again(look, {look.ids: other}), counted, self._noise)}

    def _images(self, look: Look) -> dict[str, Change]:
        """Put images in the place of others: some loss must change, of every second row alone where that is known."""
        plain, answers = look.plain, look.answers
        # Where placeholders are not known nobody can tell whose image has stayed: then all are moved.
        are_told = spares_rows(answers.input_ids) and answers.image_token_id is not None
        by_rows = rolled_rows(look.given, answers.input_ids.shape[0]) if are_told else None
        moved = by_rows or rolled(look.given) or rolled_tiles(look.given)
        if moved is None:
            return {}
        differ = (moved[1] > 0).to(plain.device, non_blocking=True)
        changed = self._again(look, moved[0])
        behind = look.counted & answers.behind_images.to(plain.device) & (plain > MIN_LOSS)
        if by_rows is None:
            return {"image": largest_change(plain, changed, behind & differ)}
        is_known = answers.has_images_by_rows(by_rows[2]).to(plain.device)
        untouched = look.untouched & is_known  # whose images have stayed
        return {
            "image": largest_change(plain, changed, behind & differ & untouched.logical_not()),
            "apart": mean_change(plain, changed, untouched & differ, self._noise),
        }

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
        """Return the losses at the candidates, float32 [b, k]; None where there are no logits."""
        with as_trained(self._model, self._autocast):
            source = self._logits(given, aligned)
        if source is None:
            return None
        positions = answers.candidates
        targets = answers.targets.narrow(0, 0, positions.shape[0]).gather(1, positions)
        rows = torch.arange(positions.shape[0], device=source.device).unsqueeze(1).expand(positions.shape)
        here = positions.to(source.device)
        wanted = targets.to(source.device, torch.int64)
        return cross_entropy(source, rows.flatten(), here.flatten(), wanted.flatten()).view(positions.shape)
