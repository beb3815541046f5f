"""Statistics of all gradients on one device by the kernel: the contents are those of torch's operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS, GRADIENT_HISTOGRAM_LOG10_RANGE
from sidestep.trainer_hooks.kernels.chunk_table import ChunkTable, Stretch, make_table, table_key

LANES = 64
"""Elements that a program reads at once: two for each thread of its one warp, which never waits for another."""
CHUNK_PARTS = 2
"""Times 7 * 32 * ``LANES`` elements: a chunk."""
NUM_WARPS = 1
MAX_REGISTERS = 96
"""Of a thread: more of them would leave too few warps to keep the memory busy."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""float64 is read as float32."""
_JOINED_CHUNKS = 128
_COLUMNS = 6

_tables: dict[torch.device, ChunkTable] = {}
"""The last table of each device: it is used again as long as the gradients lie where they lay."""


def reduce_stretches(
    device: torch.device, stretches: Sequence[Stretch], *, slots: int, modules: int, filled_to: int
) -> tuple[Tensor, Tensor]:
    """Reduce flat tensors on one device.

    Args:
        device: where all of them lie.
        stretches: any sizes but 0, any mix of ``DTYPES``.
        slots: rows of the sums.
        modules: rows of the histograms.
        filled_to: a tensor's not-zero elements count as if it were filled up with NaN to a multiple of this, of which
            a chunk is one too.

    Returns:
        float64 [slots, 6] (not zero, finite and not zero, sum, within, between, largest magnitude) and int64
        [modules, bins]; the same bits for the same gradients.

    Raises:
        ValueError: a chunk is not a multiple of ``filled_to``.
    """
    if _chunk_elements() % filled_to:
        raise ValueError(f"a chunk of {_chunk_elements()} elements is no multiple of {filled_to}")
    from sidestep.trainer_hooks.kernels.gradient_kernel import join_chunks, reduce_chunks  # noqa: PLC0415  (Triton)

    table = _table(device, stretches)
    sums = torch.zeros((slots, _COLUMNS), dtype=torch.float64, device=device)
    histograms = torch.zeros((modules, GRADIENT_HISTOGRAM_BINS), dtype=torch.int64, device=device)
    partials = torch.empty((table.num_chunks, _COLUMNS), dtype=torch.float64, device=device)
    low, high = GRADIENT_HISTOGRAM_LOG10_RANGE
    density = GRADIENT_HISTOGRAM_BINS / (high - low)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for launch in table.launches:
            reduce_chunks[(launch.num_chunks,)](
                table.chunks,
                launch.first_chunk,
                partials,
                histograms,
                element=_element(launch.dtype),
                is_aligned=launch.is_aligned,
                lanes=LANES,
                parts=CHUNK_PARTS,
                filled_to=filled_to,
                slope=density * math.log10(2.0),
                offset=-low * density - 0.5,
                smallest=1.0001 * 10.0**low,
                native=device.type == "cuda",
                num_warps=NUM_WARPS,
                maxnreg=MAX_REGISTERS,
            )
        rounds = 1 << (-(-table.most_chunks // _JOINED_CHUNKS) - 1).bit_length()  # few values: each is compiled
        join_chunks[(table.spans.shape[0],)](partials, table.spans, sums, group=_JOINED_CHUNKS, rounds=rounds)
    return sums, histograms


def _table(device: torch.device, stretches: Sequence[Stretch]) -> ChunkTable:
    chunk_elements = _chunk_elements()
    key = table_key(stretches, device, chunk_elements)
    table = _tables.get(device)
    if table is None or table.key != key:
        table = _tables[device] = make_table(key, stretches, device, chunk_elements)
    return table


def _chunk_elements() -> int:
    return CHUNK_PARTS * 7 * 32 * LANES


def _element(dtype: torch.dtype) -> object:
    import triton.language as tl  # noqa: PLC0415  (only where a kernel runs)

    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float64: tl.float64,
    }[dtype]
