"""The kernels in Triton's interpreter: arithmetic, masks and edges, on a machine without a device."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sidestep.trainer_hooks.kernels import gradient_launch, row_launch
from sidestep.trainer_hooks.kernels.choice import kernels


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose the kernels, interpreted, in blocks so small that few of them take a test far."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'sidestep[kernels]'")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: tests/gpu runs the kernels themselves")
    # Read when the kernels' modules are first imported, which they are within a test of this folder.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SIDESTEP_KERNELS", "triton")
    monkeypatch.setattr(kernels, "failures", Counter())
    monkeypatch.setattr(gradient_launch, "LANES", 32)
    monkeypatch.setattr(gradient_launch, "CHUNK_PARTS", 1)
    monkeypatch.setattr(gradient_launch, "_tables", {})
    monkeypatch.setattr(row_launch, "LANES", 16)
    monkeypatch.setattr(row_launch, "MEAN_LANES", 64)
    monkeypatch.setattr(row_launch, "LEAST_GROUP_ROWS", 4)
    monkeypatch.setattr(row_launch, "MOST_GROUPS", 2)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", "All-NaN")  # numpy stands for the device, which says nothing of these
        yield
