"""The signals of one step: joined over micro-batches, staged with one copy, a message on the publisher's thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.limits import MAX_SIGNAL_HASHES, MAX_SIGNAL_MEAN_IDS
from sidestep.protocol.messages import Signals
from sidestep.trainer_hooks.courtesy import give_way
from sidestep.trainer_hooks.signals.counts import NUM_COUNTS, add_counts
from sidestep.trainer_hooks.signals.images import describe_images
from sidestep.trainer_hooks.signals.late_rows import highest_means, late_projector_numbers
from sidestep.trainer_hooks.signals.microbatch import HostCopies, MicroArrays, MicroSignals, micro_arrays
from sidestep.trainer_hooks.staging import arrays_below

Arrays = Mapping[str, NDArray[Any]]

_MOST_PLACE = 255
_ANSWER_NUMBERS = 1 << 16
_MOST_TRAINER_LOSSES = 1_024


@dataclass(slots=True, kw_only=True, eq=False)
class StepFacts:
    """What is known of a step on the host when it ends."""

    step: int
    max_rows: int
    has_eos: bool
    rates: Sequence[float] = ()
    group_settings: Sequence[float] = ()
    gradients_lost: int = 0
    step_seconds: float = -1.0
    wait_seconds: float = 0.0
    signal_seconds: float = 0.0
    device_seconds: float = -1.0
    rows_share: float = 1.0
    heartbeat_digest: int = 0
    heartbeat_ungrouped: int = 0
    norm_shares: int = 0
    norms_clipped: bool = False
    forward_seconds: float = -1.0
    optimizer_steps: Sequence[float] = ()
    """Where they lie on the host; else they are among the tensors."""


@dataclass(slots=True, eq=False)
class StepSignals:
    """What a step gathered; its tensors are nobody else's."""

    microbatches: Sequence[MicroSignals] = ()
    projector: Sequence[Tensor] = ()
    """Per call of the projector: root mean square and spread, float32 [2]; or what it gave, where that is small."""
    gradient_norm: Tensor | None = None
    """float32 [1]"""
    module_norms: Tensor | None = None
    """float32 [modules]"""
    weight_norms: Tensor | None = None
    """float32 [modules]"""
    optimizer_steps: Tensor | None = None
    """float64 [groups], where they lie on a device."""
    heartbeat: Tensor | None = None
    vocabulary: int = field(init=False, default=0)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is to be copied, by name; the means of all micro-batches are joined here, on their device."""
        made = {
            f"{place}/{name}": tensor
            for place, micro in enumerate(self.microbatches)
            for name, tensor in micro.tensors.items()
        }
        sums = [micro.mean_sum for micro in self.microbatches if micro.mean_sum is not None]
        if sums and all(each.shape == sums[0].shape and each.device == sums[0].device for each in sums):
            total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)
            highest = total.topk(min(MAX_SIGNAL_MEAN_IDS, total.shape[0]))
            made |= {"mean_ids": highest.indices.to(torch.int32), "mean_values": highest.values}
            self.vocabulary = total.shape[0]
        else:
            self.vocabulary = next((micro.vocabulary for micro in self.microbatches if micro.vocabulary), 0)
        for micro in self.microbatches:
            micro.mean_sum = None
        made |= {f"projector/{place}": tensor for place, tensor in enumerate(self.projector)}
        for name in ("gradient_norm", "module_norms", "weight_norms", "optimizer_steps", "heartbeat"):
            tensor = getattr(self, name)
            if tensor is not None:
                made[name] = tensor
        return made

    def host_copies(self) -> list[HostCopies | None]:
        """Return the micro-batches' copies, in order."""
        return [micro.host for micro in self.microbatches]


def signals_message(facts: StepFacts, copies: Sequence[HostCopies | None], vocabulary: int, arrays: Arrays) -> Signals:
    """Make the message of a step from what was staged."""
    micros = [micro_arrays(host, arrays_below(f"{place}/", arrays)) for place, host in enumerate(copies)]
    unknown = np.full(NUM_COUNTS, -1, np.int64)  # no forward of the step showed labels
    counts = add_counts(np.stack([micro.counts for micro in micros])) if micros else unknown
    labelled = sum(micro.labelled for micro in micros)
    give_way()
    rows = _rows(micros, facts)
    mean = _mean(micros, arrays, rows["counted"])
    give_way()
    images = [array for name, array in arrays.items() if name.endswith("/images")]
    images += [micro.image_numbers for micro in micros if micro.image_numbers is not None]
    image_hashes, deviations, means = describe_images(images)
    rms, spread = _projector([array for name, array in arrays.items() if name.startswith("projector/")])
    trainer = [array for name, array in arrays.items() if name.endswith("/trainer_loss")]
    trainer += [np.array([micro.trainer_loss]) for micro in micros if micro.trainer_loss is not None]
    return Signals(
        step=facts.step,
        counts=counts,
        labelled=labelled,
        sampled=int(rows["targets"].size) < labelled,
        vocabulary=vocabulary,
        targets=rows["targets"],
        predictions=rows["predictions"],
        losses=rows["losses"],
        entropies=rows["entropies"],
        eos_probabilities=rows["eos"],
        places=rows["places"],
        answers=rows["answers"],
        top_probability=rows["top"],
        mean_ids=mean[0],
        mean_probabilities=mean[1],
        trainer_losses=_joined(trainer, np.float32)[:_MOST_TRAINER_LOSSES],
        sample_hashes=_joined([micro.hashes for micro in micros], np.int64)[:MAX_SIGNAL_HASHES],
        image_hashes=image_hashes,
        image_deviations=deviations,
        projector_rms=rms,
        projector_spread=spread,
        gradient_norm=_array(arrays, "gradient_norm"),
        module_norms=_array(arrays, "module_norms"),
        heartbeat=_array(arrays, "heartbeat"),
        heartbeat_digest=facts.heartbeat_digest,
        heartbeat_ungrouped=facts.heartbeat_ungrouped,
        rates=np.array(facts.rates, np.float64),
        step_seconds=facts.step_seconds,
        wait_seconds=facts.wait_seconds,
        signal_seconds=facts.signal_seconds,
        device_seconds=facts.device_seconds,
        rows_share=facts.rows_share,
        norm_shares=facts.norm_shares,
        norms_clipped=facts.norms_clipped,
        forward_seconds=facts.forward_seconds,
        image_means=means,
        weight_norms=_array(arrays, "weight_norms"),
        optimizer_steps=np.asarray(arrays.get("optimizer_steps", facts.optimizer_steps), np.float64).reshape(-1),
        group_settings=_single(facts.group_settings),
        gradients_lost=facts.gradients_lost,
    )


def _rows(micros: Sequence[MicroArrays], facts: StepFacts) -> dict[str, Any]:
    """Join the micro-batches' rows, and leave out what is over the limit.

    The first step may be over it: how many micro-batches make a step is not known before.
    """
    offsets = np.cumsum([0, *(micro.num_answers for micro in micros)])
    answers = _joined([micro.answers + offset for micro, offset in zip(micros, offsets, strict=False)], np.int64)
    targets = _joined([micro.targets for micro in micros], np.int32)
    kept = slice(0, facts.max_rows)
    per_row = {
        name: _joined([getattr(micro, name) for micro in micros], np.float32)
        for name in ("losses", "entropies", "eos", "top")
    }
    whole = all(per_row[name].size == targets.size for name in ("entropies", "eos", "top"))
    with np.errstate(over="ignore", invalid="ignore"):
        half = {name: values[kept].astype(np.float16) for name, values in per_row.items()}
    none = np.zeros(0, np.float16)
    places = np.minimum(_joined([micro.places for micro in micros], np.int64), _MOST_PLACE)
    top = per_row["top"][np.isfinite(per_row["top"])]
    predictions = _joined([micro.predictions for micro in micros], np.int32)
    return {
        "counted": targets.size if whole else 0,
        "targets": targets[kept],
        "predictions": predictions[kept] if predictions.size == targets.size else np.zeros(0, np.int32),
        "losses": half["losses"],
        "entropies": half["entropies"] if whole else none,
        "eos": half["eos"] if whole and facts.has_eos else none,
        "places": places[kept].astype(np.uint8),
        "answers": (answers[kept] % _ANSWER_NUMBERS).astype(np.uint16),
        "top": float(top.mean(dtype=np.float64)) if top.size else -1.0,
    }


def _mean(micros: Sequence[MicroArrays], arrays: Arrays, counted: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The mean prediction; nothing where a row was no number, which makes all of it none."""
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    late = [micro.mean_sum for micro in micros if micro.mean_sum is not None]
    if not counted or (not late and "mean_values" not in arrays):
        return none
    if late and any(each.shape != late[0].shape for each in late):
        return none
    ids, sums = highest_means(np.sum(late, axis=0), MAX_SIGNAL_MEAN_IDS) if late else (
        arrays["mean_ids"].astype(np.int32), arrays["mean_values"]
    )  # fmt: skip
    return (ids, (sums / counted).astype(np.float32)) if np.isfinite(sums).all() else none


def _projector(seen: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """The lowest of each over the calls; of the spread, over those that saw more than one image."""
    if not seen:
        return -1.0, -1.0
    numbers = np.stack([each if each.ndim == 1 else late_projector_numbers(each) for each in seen])
    spreads = numbers[:, 1][~(numbers[:, 1] < 0)]
    return float(numbers[:, 0].min()), float(spreads.min()) if spreads.size else -1.0


def _array(arrays: Arrays, name: str) -> NDArray[np.float32]:
    return np.asarray(arrays[name], np.float32).reshape(-1) if name in arrays else np.zeros(0, np.float32)


def _single(values: Sequence[float]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # a setting beyond it is infinite, and said so
        return np.array(values, np.float64).astype(np.float32)


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
