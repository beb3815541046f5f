"""An index that the host made, on its way to a device without anybody waiting."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """Send an index to a device without waiting for it; from pinned memory, since a pageable copy may wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
