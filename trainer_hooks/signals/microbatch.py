"""The signals of one micro-batch: what is read of it on the training thread, and what is made of that afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.messages import SIGNAL_COUNTS
from sidestep.trainer_hooks.capture import Batch
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.cross_entropy import LogitsSource, head_source, logits_source
from sidestep.trainer_hooks.reductions.host_index import to_device
from sidestep.trainer_hooks.reductions.runs import find_runs_on_host
from sidestep.trainer_hooks.signals.counts import DeviceHash, Reading, count_on_device, count_on_host, hash_on_host
from sidestep.trainer_hooks.signals.images import image_numbers
from sidestep.trainer_hooks.signals.rows import HostChoice, choose_on_device, choose_on_host, row_signals

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
    """Copies of a batch on the host, and the choice of its rows."""

    reading: Reading
    labels: Tensor
    ids: Tensor | None
    mask: Tensor | None
    choice: HostChoice
    targets: NDArray[np.int64]
    num_labelled: int

    @property
    def size_bytes(self) -> int:
        """Memory that is held until it is counted."""
        return sum(tensor.nbytes for tensor in (self.labels, self.ids, self.mask) if tensor is not None)


class MicroSignalReader:
    """Reads micro-batches; knows the ids, not the step."""

    def __init__(self, *, eos_id: int | None, pad_id: int | None, ignore_index: int) -> None:
        self._readings = tuple(
            Reading(shifted=each, ignore_index=ignore_index, eos_id=eos_id, pad_id=pad_id) for each in (False, True)
        )
        self._eos_id = eos_id
        self._hash = DeviceHash()

    def read(
        self, batch: Batch, aligned: AlignedBatch | None, *, shifted: bool, max_rows: int, seed: int, images: Any = None
    ) -> MicroSignals:
        """Read one micro-batch with labels; launches work and never waits for a device.

        Args:
            batch: as it was seen or passed; its labels are there.
            aligned: the batch aligned with its logits; needed where the labels are on a device.
            shifted: the labels' convention.
            max_rows: labelled rows that are looked at.
            seed: of the choice of answers.
            images: the forward's images, or None.

        Raises:
            ValueError: shapes that do not go together.
        """
        made = MicroSignals()
        if aligned is None:
            self._read_host(made, batch, self._readings[shifted], max_rows, seed)
        else:
            self._read_device(made, batch, aligned, max_rows, seed)
        if isinstance(batch.loss, Tensor):
            made.tensors["trainer_loss"] = batch.loss.detach().reshape(-1).narrow(0, 0, 1).to(torch.float32, copy=True)
        elif batch.loss is not None:
            made.tensors["trainer_loss"] = torch.tensor([batch.loss], dtype=torch.float32)
        numbers = image_numbers(images) if images is not None else None
        if numbers is not None:
            made.tensors["images"] = numbers
        return made

    def _read_host(self, made: MicroSignals, batch: Batch, reading: Reading, max_rows: int, seed: int) -> None:
        labels = _rows_of(batch.labels)
        assert labels is not None  # noqa: S101  (the caller has looked)
        targets = labels.numpy()
        if not reading.shifted:
            filler = np.full_like(targets[:, :1], reading.ignore_index)
            targets = np.concatenate((targets[:, 1:], filler), axis=1)
        runs = find_runs_on_host(targets, None, ignore_index=reading.ignore_index, eos_id=reading.eos_id)
        choice = choose_on_host(runs, max_rows, seed)
        chosen = targets.reshape(-1)[choice.index].astype(np.int64)
        ids, mask = _rows_of(batch.input_ids), _rows_of(batch.attention_mask)
        made.host = HostCopies(
            reading=reading,
            labels=labels.clone(),
            ids=ids.clone() if ids is not None and ids.is_cpu else None,
            mask=mask.clone() if mask is not None and mask.is_cpu and mask.shape == labels.shape else None,
            choice=choice,
            targets=chosen,
            num_labelled=int(runs.rows.size),
        )
        if not choice.index.size:
            return
        source = _source(batch, *labels.shape)
        if isinstance(source, Tensor):
            made.tensors["losses"] = source.index_select(0, to_device(choice.index, source.device))
        elif source is not None:
            places = to_device(np.stack((*np.divmod(choice.index, labels.shape[1]), chosen)), source.device)
            self._add_rows(made, source, *places.unbind(), weights=None)

    def _read_device(self, made: MicroSignals, batch: Batch, aligned: AlignedBatch, max_rows: int, seed: int) -> None:
        made.tensors["counts"] = count_on_device(aligned)
        labels = _rows_of(batch.labels)
        made.tensors["hashes"] = self._hash(aligned.targets if labels is None else labels, aligned.input_ids)
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
    return values.detach().unsqueeze(0) if values.dim() == 1 else values.detach()


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

    @property
    def num_answers(self) -> int:
        """One more than the highest number in ``answers``."""
        return int(self.answers.max()) + 1 if self.answers.size else 0


def micro_arrays(host: HostCopies | None, arrays: Arrays) -> MicroArrays:
    """Put together what was staged of a micro-batch and what was copied of its labels; on the publisher's thread."""
    if host is not None:
        labels, ids, mask = (None if t is None else t.numpy() for t in (host.labels, host.ids, host.mask))
        assert labels is not None  # noqa: S101
        counts, hashes = count_on_host(host.reading, labels, ids, mask), hash_on_host(labels, ids)
        labelled = host.num_labelled
        kept: Any = slice(None)
        targets, places = host.targets.astype(np.int32), host.choice.places
        answers = np.unique(host.choice.answers, return_inverse=True)[1]
    else:
        counts, hashes = arrays["counts"].astype(np.int64), arrays["hashes"].astype(np.int64)
        labelled = int(counts[_LABELLED])
        kept = arrays["counted"] != 0 if "counted" in arrays else slice(0)
        targets = arrays["targets"][kept].astype(np.int32) if "targets" in arrays else np.zeros(0, np.int32)
        index = arrays["index"][kept].astype(np.int64) if "index" in arrays else np.zeros(0, np.int64)
        origins = arrays["origins"][kept].astype(np.int64) if "origins" in arrays else np.zeros(0, np.int64)
        places = index - origins
        answers = np.unique(origins, return_inverse=True)[1]
    none = np.zeros(0, np.float32)
    numbers = arrays["numbers"][:, kept] if "numbers" in arrays else None
    losses = arrays["losses"][kept] if "losses" in arrays else none
    has_rows = numbers is not None or losses.size > 0
    empty = slice(None) if has_rows else slice(0)
    return MicroArrays(
        counts=counts,
        hashes=hashes,
        labelled=labelled,
        targets=targets[empty],
        places=places[empty],
        answers=answers[empty],
        losses=losses if numbers is None else numbers[0],
        entropies=none if numbers is None else numbers[1],
        eos=none if numbers is None else numbers[2],
        top=none if numbers is None else numbers[3],
        predictions=arrays["predictions"][kept].astype(np.int32) if "predictions" in arrays else np.zeros(0, np.int32),
    )


_LABELLED = SIGNAL_COUNTS.index("labelled")
