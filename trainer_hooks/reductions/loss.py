"""Per-token losses of a micro-batch, unreduced (docs/metrics.md, ``loss/``).

Which positions, and from what, in this order (docs/trainer.md, section 3):

====================  ======================  =====================================================================
labels                losses from             what travels
====================  ======================  =====================================================================
anywhere              ``token_losses``        all labelled positions
on the host           ``logits``              all labelled positions: the host lists them
on the host           ``hidden`` and ``head`` at most ``max_rows`` of them
on the device alone   ``logits``, by kernel   all positions, those without a label marked and not read
on the device alone   ``logits`` or ``head``  ``max_rows`` positions by the largest hash, those without a label marked
anywhere              nothing                 the number of labelled positions and the trainer's own loss
====================  ======================  =====================================================================
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.cross_entropy import (
    LogitsSource,
    cross_entropy,
    head_source,
    kernel_losses,
    logits_source,
)
from sidestep.trainer_hooks.reductions.host_index import to_device
from sidestep.trainer_hooks.reductions.position_hash import position_hash, position_hash_on_host

LABELLED = 0x80
"""The bit of ``roles`` that says that a position counts at all; it stays on this side of the wire."""


def reduce_loss(
    batch: AlignedBatch,
    *,
    logits: Tensor | None = None,
    token_losses: Tensor | None = None,
    hidden: Tensor | None = None,
    head: nn.Module | Tensor | None = None,
    trainer_loss: Tensor | float | None = None,
    max_rows: int = 1024,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Take the losses of a micro-batch's labelled positions, by the first way of the table above that is open.

    Args:
        batch: the aligned batch.
        logits: [B, T, V], [B, T - 1, V] or [B * T, V], any float dtype.
        token_losses: the trainer's own unreduced losses in nats, [B, T], [B, T - 1] or either flattened.
        hidden: last hidden states [B, T, D], together with ``head``.
        head: the module or weight [V, D] that turns them into logits.
        trainer_loss: the trainer's own number for this micro-batch, one element.
        max_rows: positions that are looked at where not all are.
        seed: of the position hash; one per micro-batch, so that not the same positions are taken every time.

    Returns:
        ``labelled``, int64 [1]; ``trainer_loss``, float32 [1], where given; and where there are losses: ``losses``
        float32 [n], ``targets`` int32 [n], ``roles`` uint8 [n] (``Role`` bits and ``LABELLED``), ``rows`` int32 [n]
        (flat indices; without it n is B * T and every position has its place), ``context_ids`` int32 [B, T] (-1 at
        padding) and ``document_starts`` int32 [B, T] where documents are known.

    Raises:
        ValueError: shapes that do not go together.
    """
    rows, positions = batch.targets.shape
    source: LogitsSource | Tensor | None = None
    if token_losses is not None:
        source = _every_position(token_losses, rows, positions)
    elif logits is not None:
        source = logits_source(logits, rows, positions)
    elif hidden is not None and head is not None:
        source = head_source(hidden, head, rows, positions)
    if batch.on_host:
        from_head = token_losses is None and logits is None
        parts = _on_host(batch, source, max_rows if from_head else None, seed)
    else:
        parts = _on_device(batch, source, max_rows, seed)
    if "losses" in parts:
        parts |= _contexts(batch)
    if trainer_loss is not None:
        parts["trainer_loss"] = _one_element(trainer_loss)
    return parts


def _on_host(
    batch: AlignedBatch, source: LogitsSource | Tensor | None, max_rows: int | None, seed: int
) -> dict[str, Tensor]:
    """Reduce a batch whose labels the host can list; ``max_rows`` None: all of them, however many."""
    runs = batch.runs_on_host
    parts = {"labelled": torch.tensor([runs.rows.size])}
    if source is None:
        return parts
    index, roles = runs.rows, runs.roles
    if max_rows is not None and index.size > max_rows:
        taken = np.sort(np.argpartition(position_hash_on_host(index, seed), -max_rows)[-max_rows:])
        index, roles = index[taken], roles[taken]
    return parts | _listed(batch, source, index, roles)


def _on_device(
    batch: AlignedBatch, source: LogitsSource | Tensor | None, max_rows: int, seed: int
) -> dict[str, Tensor]:
    """Reduce a batch of whose labels the host knows only the shape."""
    parts = {"labelled": batch.labelled.sum().reshape(1)}
    if isinstance(source, Tensor):
        return parts | _all_positions(batch, source)
    if source is not None and source.suits_kernel and source.device == batch.targets.device:
        targets = batch.targets.flatten().to(torch.int64)
        labelled, positions = batch.labelled.flatten(), batch.targets.shape[1]
        losses = kernel_losses(source, targets, positions=positions, labelled=labelled)
        if losses is not None:
            return parts | _all_positions(batch, losses)
    return parts if source is None else parts | _sampled(batch, source, min(max_rows, batch.labelled.numel()), seed)


def _every_position(token_losses: Tensor, rows: int, positions: int) -> Tensor:
    """Return the trainer's losses as float32 [B * T], a missing last column filled with zeros."""
    losses = token_losses.detach()
    if losses.numel() == rows * positions:
        return losses.reshape(-1).to(torch.float32)
    if losses.numel() == rows * (positions - 1):
        return F.pad(losses.reshape(rows, positions - 1), (0, 1)).flatten().to(torch.float32)
    raise ValueError(f"token_losses {tuple(losses.shape)} do not go with labels {(rows, positions)}")


def _listed(
    batch: AlignedBatch, source: LogitsSource | Tensor, index: NDArray[np.int64], roles: NDArray[np.uint8]
) -> dict[str, Tensor]:
    """Take the losses at positions that the host has listed."""
    targets = batch.targets.numpy().reshape(-1)[index]
    if isinstance(source, Tensor):
        losses = source.index_select(0, to_device(index, source.device))
    else:
        places = (*np.divmod(index, batch.targets.shape[1]), targets.astype(np.int64))
        listed = to_device(np.stack(places), source.device)
        losses = cross_entropy(source, *listed.unbind())
    return {
        "losses": losses,
        "targets": torch.from_numpy(targets.astype(np.int32)),
        "roles": torch.from_numpy(roles | np.uint8(LABELLED)),
        "rows": torch.from_numpy(index.astype(np.int32)),
    }


def _all_positions(batch: AlignedBatch, losses: Tensor) -> dict[str, Tensor]:
    """Take every position, labelled or not: the publisher leaves out those that do not count."""
    return {
        "losses": losses.to(batch.targets.device, non_blocking=True),
        "targets": batch.targets.flatten().to(torch.int32),
        "roles": _marked_roles(batch),
    }


def _sampled(batch: AlignedBatch, source: LogitsSource, count: int, seed: int) -> dict[str, Tensor]:
    """Take the labelled positions of the largest hashes; positions without a label fill up where there are too few."""
    positions = batch.targets.shape[1]
    keys = torch.where(batch.labelled.flatten(), position_hash(batch.labelled.numel(), seed, batch.labelled.device), -1)
    index = keys.topk(count, sorted=False).indices
    targets = batch.targets.flatten().index_select(0, index).to(torch.int64)
    row, position = index // positions, index % positions
    return {
        "losses": cross_entropy(source, row, position, targets),
        "targets": targets.to(torch.int32),
        "roles": _marked_roles(batch).index_select(0, index),
        "rows": index.to(torch.int32),
    }


def _marked_roles(batch: AlignedBatch) -> Tensor:
    return batch.runs.roles.flatten() + batch.labelled.flatten().to(torch.uint8) * LABELLED


def _contexts(batch: AlignedBatch) -> dict[str, Tensor]:
    """Return what the contexts of the highest losses are cut from, once it is known which those are."""
    if batch.input_ids is None:
        return {}
    ids = batch.input_ids.to(torch.int32)
    parts = {"context_ids": ids.clone() if batch.real is None else torch.where(batch.real, ids, -1)}
    if batch.new_documents is not None:
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
        parts["document_starts"] = (batch.new_documents * places).cummax(dim=1).values.to(torch.int32)
    return parts


def _one_element(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(-1).narrow(0, 0, 1).to(torch.float32)
    return torch.tensor([value], dtype=torch.float32)
