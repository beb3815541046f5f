"""What a call takes of a CUDA device's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch


def extra_bytes(call: Callable[[], object]) -> int:
    """Return what a call takes at its peak beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
