"""The gradients' kernel against float64 and against torch's operations, in every dtype and at every edge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sidestep.protocol.messages import Gradients
from sidestep.trainer_hooks.kernels import gradient_launch
from sidestep.trainer_hooks.kernels.choice import kernels
from sidestep.trainer_hooks.reductions import gradients as gradients_module
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, gradients_message, reduce_gradients

torch.set_num_threads(1)
pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.timeout(180)]

BLOCK = 32 * 32
"""Elements of a block, by the fixture."""


def parts_of(tensors: list[Tensor]) -> dict[str, Tensor]:
    made = reduce_gradients([LocalGradient(index, index % 2, tensor) for index, tensor in enumerate(tensors)])
    assert not kernels.failures
    return made


def message_of(parts: dict[str, Tensor]) -> Gradients:
    return gradients_message(step=0, arrays={name: part.numpy().copy() for name, part in parts.items()})


def check(message: Gradients, tensors: list[Tensor], std_rel: float = 1e-5) -> None:
    """Hold every tensor's partials by float64, within the tolerance of docs/metrics.md."""
    for index, tensor in enumerate(tensors):
        wide = tensor.to(torch.float32).to(torch.float64).numpy().reshape(-1)
        finite = wide[np.isfinite(wide)]
        assert message.counts[index] == wide.size
        assert message.nonfinite[index] == wide.size - finite.size
        assert message.zeros[index] == np.count_nonzero(finite == 0)
        assert message.absmax[index] == (np.abs(finite).max() if finite.size else 0.0)
        if not finite.size:
            assert message.means[index] == message.m2[index] == 0.0
            continue
        unit = math.ldexp(1.0, int(message.exponents[index]))
        std = math.sqrt(message.m2[index] / finite.size) * unit
        assert message.means[index] * unit == pytest.approx(finite.mean(), rel=1e-5, abs=1e-5 * finite.std())
        assert std == pytest.approx(finite.std(), rel=std_rel, abs=1e-7 * abs(finite).max())
    for module, row in zip(message.histogram_modules, message.histograms, strict=True):
        values = np.concatenate([t.float().double().numpy().reshape(-1) for t in tensors[module::2]])
        assert row.sum() == np.count_nonzero(np.isfinite(values) & (values != 0))
        assert np.abs(np.cumsum(row - plain_histogram(values))).max() <= 1 + values.size // 1000


def plain_histogram(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    finite = np.abs(values[np.isfinite(values) & (values != 0)])
    return np.bincount(np.clip(np.floor((np.log10(finite) + 12.0) * 4.0), 0, 63).astype(np.int64), minlength=64)


def drawn(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_size_equals_float64(dtype: torch.dtype) -> None:
    sizes = (0, 1, 2, 7, 511, BLOCK, 7 * BLOCK + 129) if dtype == torch.float32 else (0, 1, 7, BLOCK + 513)
    tensors = [(drawn(size, size) * 10.0 ** -(index % 4)).to(dtype) for index, size in enumerate(sizes)]
    check(message_of(parts_of(tensors)), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_infinity_and_zero_are_counted_apart(dtype: torch.dtype) -> None:
    broken = drawn(BLOCK + 300)
    broken[::7], broken[1::7], broken[2::7], broken[3::7] = math.nan, math.inf, 0.0, -math.inf
    half = drawn(2 * BLOCK)
    half[: BLOCK + 3] = 0.0
    one = drawn(BLOCK)
    one[100] = math.nan
    tensors = [each.to(dtype) for each in (broken, torch.full((5,), math.nan), torch.zeros(BLOCK + 1), half, one)]
    check(message_of(parts_of(tensors)), tensors)


def test_what_the_short_way_cannot_do_goes_the_long_one() -> None:
    values = drawn(BLOCK)
    wide = values.clone()
    wide[0], wide[1] = 1e15, 1e-20
    tensors = [values * 1e-44, values * 1e-30, values * 1e30, values.sign() * 3e38, values * 3e4, wide]
    check(message_of(parts_of(tensors)), tensors)


def test_std_survives_a_mean_that_is_far_larger() -> None:
    tensors = [drawn(BLOCK) * 1e-4 + ratio * 1e-4 for ratio in (10.0, 1_000.0, 30_000.0)]
    outlier = drawn(BLOCK) * 1e-6
    outlier[0] = 1.0  # a pivot
    tensors += [outlier, torch.full((7 * BLOCK,), -0.1)]  # of which every counter is at its most
    check(message_of(parts_of(tensors)), tensors)


def test_strides_and_addresses_of_every_kind() -> None:
    even = drawn(BLOCK + 32)
    tensors = [even[1 : BLOCK + 2], even[:40], even.view(-1, 32).t(), even.view(-1, 32)[:, ::2], even[0]]
    assert {tensor.data_ptr() % 16 == 0 for tensor in tensors} == {True, False}
    before = even.clone()
    check(message_of(parts_of(tensors)), tensors)
    assert torch.equal(even, before)


def test_the_contents_are_those_of_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [drawn(size, size) * 1e-3 for size in (5, 77, BLOCK + 77)]
    tensors.append(tensors[2].to(torch.bfloat16))
    ours = parts_of(tensors)
    monkeypatch.setenv("SIDESTEP_KERNELS", "torch")
    theirs = parts_of(tensors)
    assert {name: (part.dtype, part.shape) for name, part in ours.items()} == {
        name: (part.dtype, part.shape) for name, part in theirs.items()
    }
    one, other = message_of(ours), message_of(theirs)
    for name in ("counts", "nonfinite", "zeros", "exponents", "absmax", "histograms"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(one.means, other.means, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(one.m2, other.m2, rtol=2e-6)


def test_the_same_bits_again_and_one_table_while_the_addresses_stand() -> None:
    tensors = [drawn(BLOCK + 5), drawn(40)]
    first = parts_of(tensors)
    (table,) = gradient_launch._tables.values()
    second = parts_of(tensors)
    assert list(gradient_launch._tables.values()) == [table]
    for name in ("sums", "histograms"):
        assert torch.equal(first[name], second[name])
    tensors[1] = tensors[1].clone()
    third = parts_of(tensors)
    assert next(iter(gradient_launch._tables.values())) is not table
    assert torch.equal(first["sums"], third["sums"])


def test_a_tensor_of_many_chunks_is_joined_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_launch, "_JOINED_CHUNKS", 1)
    odd = torch.full((7 * BLOCK + 9,), math.inf)  # the longer way, which is shorter in the interpreter
    odd[::3] = -2.0
    tensors = [odd[1:], torch.ones(3)]
    check(message_of(parts_of(tensors)), tensors)


def test_gradients_that_are_refused_are_refused_here_too() -> None:
    with pytest.raises(TypeError, match="dense and floating"):
        reduce_gradients([LocalGradient(0, 0, torch.ones(3, dtype=torch.int64))])
    assert gradients_module.reduce_gradients([])["sums"].shape == (0, 6)
