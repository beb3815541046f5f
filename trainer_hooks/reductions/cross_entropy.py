"""Per-token cross-entropy of chosen positions, in float32, a chunk at a time (docs/metrics.md, Numerics)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.trainer_hooks.kernels.choice import kernels
from sidestep.trainer_hooks.kernels.row_launch import DTYPES, fits, read_logits

CHUNK_BYTES = 64 << 20
"""Memory that a chunk's logits may take, all copies of them together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsSource:
    """Where the logits of a position come from."""

    device: torch.device
    vocabulary_size: int
    row_bytes: int
    """Memory that the logits of one position take while they are reduced."""
    positions: int
    """Positions of a row that have logits."""
    read: Callable[[Tensor, Tensor], Tensor]
    """Rows and positions, int64 [n] each, to a new tensor of logits [n, vocabulary_size] of any float dtype."""
    logits: Tensor | None = None
    """All of them [B, T, V], where they are there."""

    @property
    def suits_kernel(self) -> bool:
        """Whether the kernel takes the place of ``read``."""
        logits = self.logits
        return logits is not None and fits(logits) and kernels.can_run("row", [logits], DTYPES)


def logits_source(logits: Tensor, rows: int, positions: int) -> LogitsSource:
    """Read logits [B, T, V], [B, T - 1, V] or [B * T, V], contiguous or not, without copying more than is asked for.

    Raises:
        ValueError: the logits do not go with ``rows`` x ``positions`` labels.
    """
    logits = logits.detach()
    if logits.dim() == 2 and logits.shape[0] == rows * positions:
        logits = logits.view(rows, positions, -1)
    if logits.dim() != 3 or logits.shape[0] != rows or logits.shape[1] not in {positions, positions - 1}:
        raise ValueError(f"logits {tuple(logits.shape)} do not go with labels {(rows, positions)}")
    return LogitsSource(
        device=logits.device,
        vocabulary_size=logits.shape[2],
        row_bytes=logits.shape[2] * (logits.element_size() + 4),
        positions=logits.shape[1],
        read=lambda row, position: _taken(logits, row, position),
        logits=logits,
    )


def head_source(hidden: Tensor, head: nn.Module | Tensor, rows: int, positions: int) -> LogitsSource:
    """Make the logits of single positions from hidden states [B, T, D] and the head that would make all of them.

    Args:
        hidden: the last hidden states, any float dtype.
        head: a module with a ``weight`` [V, D], or that weight.
        rows: B.
        positions: T.

    Raises:
        ValueError: the shapes do not go together, or the head has no weight.
    """
    hidden = hidden.detach()
    weight = head if isinstance(head, Tensor) else getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError("head= needs a weight of two axes: [vocabulary, features]")
    if hidden.dim() != 3 or hidden.shape[0] != rows or hidden.shape[1] not in {positions, positions - 1}:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not go with labels {(rows, positions)}")
    weight = weight.detach()

    def read(row: Tensor, position: Tensor) -> Tensor:
        states = _taken(hidden, row, position).to(weight.dtype)
        made = head(states) if isinstance(head, nn.Module) else F.linear(states, weight)
        if not isinstance(made, Tensor):
            raise TypeError(f"head= returned {type(made).__name__}, not a tensor of logits")
        return made

    return LogitsSource(
        device=hidden.device,
        vocabulary_size=weight.shape[0],
        row_bytes=weight.shape[0] * (weight.element_size() + 4) + weight.shape[1] * 8,
        positions=hidden.shape[1],
        read=read,
    )


def cross_entropy(source: LogitsSource, row: Tensor, position: Tensor, targets: Tensor) -> Tensor:
    """Return ``log(sum exp(z - m)) - (z_y - m)`` of each chosen position; float32 [n] on the source's device.

    Args:
        source: where logits come from.
        row: int64 [n] on the source's device.
        position: int64 [n]; brought within the positions that have logits.
        targets: int64 [n]; outside the vocabulary the loss is NaN, which is counted, and never an index error.
    """
    count = row.shape[0]
    if not count:
        return torch.zeros(0, dtype=torch.float32, device=source.device)
    losses = kernel_losses(source, targets, listed=(row, position))
    if losses is not None:
        return losses
    position = position.clamp(max=source.positions - 1)
    step = max(1, CHUNK_BYTES // source.row_bytes)
    chunks = zip(*(torch.split(each, step) for each in (row, position, targets)), strict=True)
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        return torch.cat([_reduced(source.read(of_row, at), wanted) for of_row, at, wanted in chunks])


def kernel_losses(
    source: LogitsSource,
    targets: Tensor,
    *,
    listed: tuple[Tensor, Tensor] | None = None,
    positions: int = 0,
    labelled: Tensor | None = None,
) -> Tensor | None:
    """Return the losses by the kernel, 0 where ``labelled`` is False; float32 [n], None where it does not run.

    Args:
        source: where logits come from.
        targets: int64 [n].
        listed: rows and positions, int64 [n] each; None: all, B * ``positions`` of them.
        positions: of a row of labels, where none are listed.
        labelled: bool [n], None: all are.
    """
    logits = source.logits
    if logits is None or not source.suits_kernel:
        return None
    read = kernels.attempt(
        "row",
        lambda: read_logits(logits, targets, listed=listed, positions=positions, weights=labelled, with_mean=False),
    )
    return None if read is None else read.numbers[0]


def _taken(values: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Return values [B, T, V] at chosen rows and positions; a copy of just these [n, V], whatever the strides."""
    positions = values.shape[1]
    if values.shape[0] == 1 or values.stride(0) == positions * values.stride(1):
        return values.flatten(0, 1).index_select(0, row * positions + position)
    taken: Tensor = torch.ops.aten.index.Tensor(values, [row, position])  # values[row, position]
    return taken


def _reduced(logits: Tensor, targets: Tensor) -> Tensor:
    """Reduce logits [n, V], which are this call's own and are overwritten."""
    width = logits.shape[1]
    logits = logits.to(torch.float32)
    if logits.is_cpu and int(targets.min()) >= 0 and int(targets.max()) < width:
        return F.cross_entropy(logits, targets, reduction="none")  # one operation in place of ten, and no device waits
    logits -= logits.amax(dim=1, keepdim=True)
    known = (targets >= 0) & (targets < width)
    of_target = logits.gather(1, targets.clamp(0, width - 1).unsqueeze(1)).squeeze(1)
    return torch.where(known, logits.exp_().sum(dim=1).log_() - of_target, torch.nan)
