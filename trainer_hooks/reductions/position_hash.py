"""A hash of positions, by which samples are drawn: the same on host and device, apart from any generator."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK32 = 0xFFFF_FFFF


def position_hash(count: int, seed: int, device: torch.device) -> Tensor:
    """Return 32 well-mixed bits of each of ``count`` positions; int64, all different."""
    value = (torch.arange(count, device=device) + _offset(seed)) & _MASK32
    value = ((value >> 16) ^ value) * 0x7FEB_352D & _MASK32
    value = ((value >> 15) ^ value) * 0x846C_A68B & _MASK32
    return (value >> 16) ^ value


def position_hash_on_host(index: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the same of the positions ``index`` [n]."""
    value = (index + _offset(seed)) & _MASK32
    value = ((value >> 16) ^ value) * 0x7FEB_352D & _MASK32
    value = ((value >> 15) ^ value) * 0x846C_A68B & _MASK32
    return (value >> 16) ^ value


def _offset(seed: int) -> int:
    return seed * 0x9E37_79B1 & _MASK32
