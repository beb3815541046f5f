"""The signals of one micro-batch: what is read of it on the training thread, and what is made of that afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.messages import SIGNAL_COUNTS
from sidestep.trainer_hooks.capture import Batch
from sidestep.trainer_hooks.courtesy import give_way
from sidestep.trainer_hooks.loader import BatchHashes
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.cross_entropy import LogitsSource, head_source, logits_source
from sidestep.trainer_hooks.reductions.host_index import to_device
from sidestep.trainer_hooks.signals.counts import DeviceHash, Reading, count_on_device, count_targets, hash_on_host
from sidestep.trainer_hooks.signals.images import copied_images, image_numbers
from sidestep.trainer_hooks.signals.late_rows import (
    MAX_LATE_BYTES,
    RowWindow,
    choose_window,
    labelled_rows,
    late_image_numbers,
    reduce_rows,
    whole_answers,
)
from sidestep.trainer_hooks.signals.packed_images import PackedImages
from sidestep.trainer_hooks.signals.rows import choose_on_device, row_signals

Arrays = Mapping[str, NDArray[Any]]


@dataclass(slots=True, eq=False)
class MicroSignals:
    """What was read; its tensors are nobody else's."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """To be copied to the host."""
    mean_sum: Tensor | None = None
    """Sum of the rows' probabilities, float32 [vocabulary]; it stays on its device until the step ends."""
    host: HostCopies | None = None
    """Where the labels are on the host: what is counted later."""
    vocabulary: int = 0


@dataclass(slots=True, eq=False)
class HostCopies:
    """Copies of a batch on the host, the choice of its rows, and what of it is worked out later."""

    reading: Reading
    labels: NDArray[Any]
    ids: NDArray[Any] | None
    mask: NDArray[Any] | None
    window: RowWindow
    logits: NDArray[np.float32] | None = None
    """Those of the window's rows, float32 [n, V], where they are few."""
    images: Tensor | None = None
    """Pixels [n, p], where they are few."""
    encoder_ids: NDArray[Any] | None = None
    """What tells samples apart beside their labels, where the ids do not go with these."""
    trainer_loss: float | None = None

    @property
    def size_bytes(self) -> int:
        """Memory that is held until it is counted."""
        held = (self.labels, self.ids, self.encoder_ids, self.mask, self.logits, self.images)
        return sum(each.nbytes for each in held if each is not None)


class MicroSignalReader:
    """Reads micro-batches; knows the ids, not the step."""

    def __init__(
        self, *, eos_id: int | None, pad_id: int | None, ignore_index: int, prompt_end: tuple[int, ...] = ()
    ) -> None:
        plain = Reading(shifted=False, ignore_index=ignore_index, eos_id=eos_id, pad_id=pad_id, prompt_end=prompt_end)
        self._readings = (plain, replace(plain, shifted=True))
        self._prompt_end = prompt_end
        self._eos_id = eos_id
        self._hash = DeviceHash()

    def read(
        self,
        batch: Batch,
        aligned: AlignedBatch | None,
        *,
        shifted: bool,
        max_rows: int,
        seed: int,
        images: Any = None,
        hashes: BatchHashes | None = None,
        copied: NDArray[Any] | None = None,
    ) -> MicroSignals:
        """Read one micro-batch with labels; launches work and never waits for a device.

        Args:
            batch: as it was seen or passed; its labels are there.
            aligned: the batch aligned with its logits; needed where the labels are on a device.
            shifted: the labels' convention.
            max_rows: labelled rows that are looked at.
            seed: of the choice of answers.
            images: the forward's images, or None.
            hashes: what the data loader's workers made of this batch; it is not hashed again then.
            copied: a copy of the labels on the host, where one was made already.

        Raises:
            ValueError: shapes that do not go together.
        """
        made = MicroSignals()
        if hashes is not None:
            made.tensors["hashes"] = torch.from_numpy(hashes.samples)
            if hashes.images is not None:
                made.tensors["images"], images = torch.from_numpy(hashes.images), None
        if aligned is None:
            made.host = _copies(batch, copied, self._readings[shifted], max_rows, seed)
            if made.host.window.index.size:
                self._read_rows(made, made.host, batch)
        else:
            self._read_device(made, batch, aligned, max_rows, seed)
        self._take_loss(made, batch.loss)
        if images is not None:
            self._take_images(made, images)
        return made

    def _take_loss(self, made: MicroSignals, loss: Tensor | float | None) -> None:
        if loss is None:
            return
        if isinstance(loss, Tensor) and (made.host is None or not loss.is_cpu):
            made.tensors["trainer_loss"] = loss.detach().reshape(-1).narrow(0, 0, 1).to(torch.float32, copy=True)
        elif made.host is None:
            made.tensors["trainer_loss"] = torch.tensor([loss], dtype=torch.float32)
        elif isinstance(loss, Tensor):
            made.host.trainer_loss = float(loss.item() if loss.numel() == 1 else loss.detach().reshape(-1)[0])
        else:
            made.host.trainer_loss = float(loss)

    def _take_images(self, made: MicroSignals, images: Any) -> None:
        if isinstance(images, PackedImages):
            made.tensors["images"] = images.numbers()
            return
        if made.host is not None:
            made.host.images = copied_images(images, MAX_LATE_BYTES)
            if made.host.images is not None:
                return
        numbers = image_numbers(images)
        if numbers is not None:
            made.tensors["images"] = numbers

    def _read_rows(self, made: MicroSignals, host: HostCopies, batch: Batch) -> None:
        """Copy the chosen rows' logits; only where they are many, or not on the host, more is done here."""
        index, shape = host.window.index, host.labels.shape
        host.logits = _few_logits(batch.logits, index, shape)
        if host.logits is not None:
            made.vocabulary = host.logits.shape[1]
            return
        source = _source(batch, *shape)
        if isinstance(source, Tensor):
            made.tensors["losses"] = source.index_select(0, to_device(index, source.device))
        elif source is not None:
            row, position = np.divmod(index, shape[1])
            is_few = index.size * source.vocabulary_size * 4 <= MAX_LATE_BYTES
            if is_few and source.device.type == "cpu" and source.positions == shape[1]:
                taken = source.read(torch.from_numpy(row), torch.from_numpy(position))
                host.logits = taken.detach().to(torch.float32).numpy()
                made.vocabulary = source.vocabulary_size
                return
            targets = host.labels.reshape(-1)[index + (not host.reading.shifted)].astype(np.int64)
            places = to_device(np.stack((row, position, targets)), source.device)
            self._add_rows(made, source, *places.unbind(), weights=None)

    def _read_device(self, made: MicroSignals, batch: Batch, aligned: AlignedBatch, max_rows: int, seed: int) -> None:
        made.tensors["counts"] = count_on_device(aligned, self._prompt_end)
        labels = _rows_of(batch.labels)
        if "hashes" not in made.tensors:
            ids = _rows_of(batch.encoder_ids)
            ids = aligned.input_ids if ids is None else ids.to(aligned.targets.device, non_blocking=True)
            made.tensors["hashes"] = self._hash(aligned.targets if labels is None else labels, ids)
        index, origins = choose_on_device(aligned, max_rows, seed)
        counted = aligned.labelled.flatten().index_select(0, index)
        targets = aligned.targets.flatten().index_select(0, index).to(torch.int64)
        rows, positions = aligned.targets.shape
        source = _source(batch, rows, positions)
        if source is None:
            return
        made.tensors |= {
            "targets": torch.where(counted, targets, -1).to(torch.int32),
            "counted": counted.to(torch.uint8),
            "index": index.to(torch.int32),
            "origins": origins.to(torch.int32),
        }
        if isinstance(source, Tensor):
            made.tensors["losses"] = source.index_select(0, index)
            return
        self._add_rows(made, source, index // positions, index % positions, targets, weights=counted.to(torch.float32))

    def _add_rows(
        self,
        made: MicroSignals,
        source: LogitsSource,
        row: Tensor,
        position: Tensor,
        targets: Tensor,
        *,
        weights: Tensor | None,
    ) -> None:
        read = row_signals(source, row, position, targets, eos_id=self._eos_id, weights=weights)
        made.tensors |= {"numbers": read.numbers, "predictions": read.predictions}
        made.mean_sum = read.mean_sum
        made.vocabulary = source.vocabulary_size


def _rows_of(values: Tensor | None) -> Tensor | None:
    """Return [B, T], also of a batch without a row axis; None for anything else."""
    if values is None or values.dim() not in {1, 2}:
        return None
    rows = values.detach() if values.requires_grad else values
    return rows.unsqueeze(0) if rows.dim() == 1 else rows


def _copies(batch: Batch, labels: NDArray[Any] | None, reading: Reading, max_rows: int, seed: int) -> HostCopies:
    """Copy what of a batch is on the host, ``labels`` only where they were not copied already."""
    own, ids, mask = _rows_of(batch.labels), _rows_of(batch.input_ids), _rows_of(batch.attention_mask)
    assert own is not None  # noqa: S101  (the caller has looked)
    labels = _copied(own) if labels is None else labels.reshape(own.shape)
    rows = labelled_rows(labels, reading.ignore_index, shifted=reading.shifted)
    return HostCopies(
        reading=reading,
        labels=labels,
        ids=_copied(ids) if ids is not None and ids.is_cpu else None,
        encoder_ids=_rows_on_host(batch.encoder_ids, own.shape[0]),
        mask=_copied(mask) if mask is not None and mask.is_cpu and mask.shape == own.shape else None,
        window=choose_window(rows, max_rows, seed),
    )


def _copied(values: Tensor) -> NDArray[Any]:
    """Return a copy of values on the host; among cold caches numpy makes it faster than torch."""
    copied: NDArray[Any] = _as_array(values).copy()
    return copied


def _rows_on_host(values: Tensor | None, num_rows: int) -> NDArray[Any] | None:
    """Return a copy of rows [B, S] that lie on the host, None of others."""
    rows = _rows_of(values)
    return _copied(rows) if rows is not None and rows.is_cpu and rows.shape[0] == num_rows else None


def _source(batch: Batch, rows: int, positions: int) -> LogitsSource | Tensor | None:
    """Where the rows' numbers come from: logits, else hidden states and head, else the trainer's own losses."""
    if batch.logits is not None:
        return logits_source(batch.logits, rows, positions)
    if batch.hidden is not None and batch.head is not None:
        return head_source(batch.hidden, batch.head, rows, positions)
    losses = batch.token_losses
    if losses is not None and losses.numel() == rows * positions:
        return losses.detach().reshape(-1).to(torch.float32)
    return None


def _few_logits(logits: Tensor | None, index: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Copy chosen rows of logits [B, T, V] that are on the host as nearly all are; None where they are not, or many."""
    if logits is None or not logits.is_cpu or logits.dtype is not torch.float32 or logits.dim() != 3:
        return None
    rows, positions, vocabulary = logits.shape
    if (rows, positions) != shape or index.size * vocabulary * 4 > MAX_LATE_BYTES or not logits.is_contiguous():
        return None
    flat: NDArray[np.float32] = logits.detach().numpy().reshape(rows * positions, vocabulary)
    return flat.take(index, axis=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroArrays:
    """One micro-batch on the host, ready to be joined with the step's others."""

    counts: NDArray[np.int64]
    hashes: NDArray[np.int64]
    labelled: int
    targets: NDArray[np.int32]
    places: NDArray[np.int64]
    answers: NDArray[np.int64]
    """Numbered from 0 within the micro-batch."""
    losses: NDArray[np.float32]
    entropies: NDArray[np.float32]
    eos: NDArray[np.float32]
    top: NDArray[np.float32]
    predictions: NDArray[np.int32]
    mean_sum: NDArray[np.float32] | None = None
    """Sum of the rows' probabilities [vocabulary], where it was worked out here."""
    image_numbers: NDArray[np.float32] | None = None
    trainer_loss: float | None = None

    @property
    def num_answers(self) -> int:
        """One more than the highest number in ``answers``."""
        return int(self.answers.max()) + 1 if self.answers.size else 0


_NO_INTS: NDArray[np.int32] = np.zeros(0, np.int32)
_NO_FLOATS: NDArray[np.float32] = np.zeros(0, np.float32)


def micro_arrays(host: HostCopies | None, arrays: Arrays) -> MicroArrays:
    """Put together what was staged of a micro-batch and what was copied of it; on the publisher's thread."""
    give_way()
    return _of_device(arrays) if host is None else _of_host(host, arrays)


def _of_host(host: HostCopies, arrays: Arrays) -> MicroArrays:
    reading, window = host.reading, host.window
    labels, ids, mask = host.labels, host.ids, host.mask
    targets, runs = reading.targets_and_runs(labels)
    give_way()
    kept, places, answers = whole_answers(window, runs)
    chosen = targets.reshape(-1)[window.index][kept].astype(np.int64)
    numbers, predictions, mean_sum = None, _NO_INTS, None
    if host.logits is not None:
        numbers, predictions, mean_sum = reduce_rows(host.logits[kept], chosen, reading.eos_id)
    elif "numbers" in arrays:
        numbers, predictions = arrays["numbers"][:, kept], arrays["predictions"][kept].astype(np.int32)
    losses = arrays["losses"][kept] if "losses" in arrays else _NO_FLOATS
    has_rows = slice(None) if numbers is not None or losses.size else slice(0)
    give_way()
    return MicroArrays(
        counts=count_targets(reading, targets, runs, ids, mask),
        hashes=arrays["hashes"].astype(np.int64) if "hashes" in arrays else _hashes(labels, ids, host.encoder_ids),
        labelled=window.num_labelled,
        targets=chosen[has_rows].astype(np.int32),
        places=places[kept][has_rows],
        answers=np.unique(answers[kept], return_inverse=True)[1][has_rows],
        losses=losses if numbers is None else numbers[0],
        entropies=_NO_FLOATS if numbers is None else numbers[1],
        eos=_NO_FLOATS if numbers is None else numbers[2],
        top=_NO_FLOATS if numbers is None else numbers[3],
        predictions=predictions,
        mean_sum=mean_sum,
        image_numbers=None if host.images is None else late_image_numbers(_as_array(host.images)),
        trainer_loss=host.trainer_loss,
    )


def _as_array(values: Tensor) -> NDArray[Any]:
    """Return them as numpy holds them: it has no bfloat16."""
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()


def _hashes(labels: NDArray[Any], ids: NDArray[Any] | None, encoder_ids: NDArray[Any] | None) -> NDArray[np.int64]:
    return hash_on_host(labels, ids if encoder_ids is None else encoder_ids)


def _of_device(arrays: Arrays) -> MicroArrays:
    counts = arrays["counts"].astype(np.int64)
    kept: Any = arrays["counted"] != 0 if "counted" in arrays else slice(0)
    chosen = {
        name: arrays[name][kept].astype(np.int64) if name in arrays else np.zeros(0, np.int64)
        for name in ("targets", "index", "origins")
    }
    numbers = arrays["numbers"][:, kept] if "numbers" in arrays else None
    losses = arrays["losses"][kept] if "losses" in arrays else _NO_FLOATS
    return MicroArrays(
        counts=counts,
        hashes=arrays["hashes"].astype(np.int64),
        labelled=int(counts[_LABELLED]),
        targets=chosen["targets"].astype(np.int32),
        places=chosen["index"] - chosen["origins"],
        answers=np.unique(chosen["origins"], return_inverse=True)[1],
        losses=losses if numbers is None else numbers[0],
        entropies=_NO_FLOATS if numbers is None else numbers[1],
        eos=_NO_FLOATS if numbers is None else numbers[2],
        top=_NO_FLOATS if numbers is None else numbers[3],
        predictions=arrays["predictions"][kept].astype(np.int32) if "predictions" in arrays else _NO_INTS,
    )


_LABELLED = SIGNAL_COUNTS.index("labelled")
