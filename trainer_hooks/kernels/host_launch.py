"""Statistics of gradients in the host's memory by the compiled kernel; until it is there, numpy's passes do the same.

It is compiled and loaded on a thread of its own, once a process, and held by float64 before it is used.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS, GRADIENT_HISTOGRAM_LOG10_RANGE
from sidestep.trainer_hooks.errors import KernelError
from sidestep.trainer_hooks.kernels import host_build
from sidestep.trainer_hooks.reductions.gradient_pieces import COLUMNS, ROW_ELEMENTS, Piece

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHECKED_ELEMENTS = 5003
"""More than one chunk of the source, and the last one not full."""

Function = Callable[..., None]


class HostKernel:
    """The kernel of one process: asked for at attach, there some time later."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._function: Function | None = None
        self._error: Exception | None = None

    def begin(self) -> None:
        """See to it that the kernel is being made; returns at once."""
        with self._starting:
            if self._thread is not None and self._pid == os.getpid():  # a fork has no threads but the one that forked
                return
            self._pid = os.getpid()
            self._thread = threading.Thread(target=self._make, name="sidestep-kernel", daemon=True)
            self._thread.start()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until the kernel is made, and return whether it can be used; never called in a training."""
        self.begin()
        assert self._thread is not None  # noqa: S101  (begin has made one)
        self._thread.join(timeout_seconds)
        return self._function is not None

    @property
    def is_settled(self) -> bool:
        """Whether it is there, or is known to fail."""
        return self._function is not None or self._error is not None

    def reduce(self, pieces: Sequence[Piece], *, slots: int, modules: int) -> tuple[Tensor, Tensor]:
        """Reduce flat tensors in the host's memory.

        Args:
            pieces: any sizes but 0, any mix of floating dtypes; others than ``_KINDS`` are read as float32.
            slots: rows of the sums.
            modules: rows of the histograms.

        Returns:
            float64 [slots, 6] (not zero, finite and not zero, sum, within, between, largest magnitude) and int64
            [modules, bins]; the same bits for the same gradients.

        Raises:
            KernelError: the kernel could not be made.
        """
        if self._function is None:
            raise KernelError(str(self._error or "it is not there yet"))
        sums, histograms = _reduced(self._function, pieces, slots, modules)
        return torch.from_numpy(sums), torch.from_numpy(histograms)

    def _make(self) -> None:
        try:
            chosen = host_build.instructions()
            if chosen is None:
                raise KernelError(host_build.obstacle())
            self._load(chosen)
        except Exception as error:  # noqa: BLE001  (whoever reduces next says it, and counts it)
            self._error = error

    def _load(self, chosen: host_build.Instructions) -> None:
        function = _loaded(str(host_build.library(chosen)))
        _check(function)
        self._function = function


def _loaded(path: str) -> Function:
    function: Any = ctypes.CDLL(path).sidestep_reduce_gradients  # lets go of the interpreter's lock while it runs
    function.argtypes = [ctypes.c_int64, *(ctypes.c_void_p for _ in range(7))]
    function.restype = None
    made: Function = function
    return made


def _reduced(
    function: Function, pieces: Sequence[Piece], slots: int, modules: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    held = [_side_by_side(each.values) for each in pieces]
    sums = np.zeros((slots, COLUMNS))
    histograms = np.zeros((modules, GRADIENT_HISTOGRAM_BINS), np.int64)
    tables = (
        np.array([values.data_ptr() for values in held], np.uint64),
        np.array([values.shape[0] for values in held], np.int64),
        np.array([_KINDS[values.dtype] for values in held], np.int32),
        np.array([each.slot for each in pieces], np.int32),
        np.array([each.module for each in pieces], np.int32),
    )
    function(len(held), *(table.ctypes.data for table in (*tables, sums, histograms)))
    return sums, histograms


def _side_by_side(values: Tensor) -> Tensor:
    return (values if values.dtype in _KINDS else values.to(torch.float32)).resolve_neg().contiguous()


def _check(function: Function) -> None:
    """Hold what has been compiled by float64, on values that no compiler can have foreseen.

    Raises:
        KernelError: it says something else.
    """
    generator = np.random.default_rng(0)
    values = (
        generator.standard_normal(_CHECKED_ELEMENTS) * 10.0 ** generator.integers(-6, 2, _CHECKED_ELEMENTS)
    ).astype(np.float32)
    values[::97], values[5], values[6], values[-1] = 0.0, np.nan, -np.inf, -0.0
    (sums,), (histogram,) = _reduced(function, [Piece(slot=0, module=0, values=torch.from_numpy(values))], 1, 1)
    finite = values[np.isfinite(values)].astype(np.float64)
    counted = np.abs(finite[finite != 0])
    not_zero = counted.size + values.size - finite.size + -values.size % ROW_ELEMENTS
    expected = [not_zero, counted.size, finite.sum(), np.square(finite).sum(), np.abs(finite).max()]
    found = [*sums[:3], sums[3] + sums[4], sums[5]]
    is_right = np.allclose(found, expected, rtol=1e-6, atol=1e-6 * counted.sum()) and (
        histogram.sum() == counted.size and np.abs(np.cumsum(histogram - _histogram(counted))).max() <= 1
    )
    if not is_right:
        raise KernelError("what has been compiled does not say what float64 says")


def _histogram(magnitudes: NDArray[np.float64]) -> NDArray[np.int64]:
    low, high = GRADIENT_HISTOGRAM_LOG10_RANGE
    bins = np.floor((np.log10(magnitudes) - low) * GRADIENT_HISTOGRAM_BINS / (high - low)).astype(np.int64)
    return np.bincount(np.clip(bins, 0, GRADIENT_HISTOGRAM_BINS - 1), minlength=GRADIENT_HISTOGRAM_BINS)


host_kernel = HostKernel()
"""This process's."""
