"""Gradient partials against float64, over every make of tensor that an optimizer sees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS
from sidestep.protocol.merge import Moments
from sidestep.protocol.messages import Gradients
from sidestep.trainer_hooks.reductions import gradient_rows
from sidestep.trainer_hooks.reductions import gradients as gradients_module
from sidestep.trainer_hooks.reductions.gradient_pieces import ROW_ELEMENTS
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, gradients_message, reduce_gradients

torch.set_num_threads(1)

ROW = ROW_ELEMENTS


def message_of(gradients: list[LocalGradient], **arguments: Any) -> Gradients:
    scale = arguments.pop("scale", None)
    arrays = {name: part.numpy().copy() for name, part in reduce_gradients(gradients, scale).items()}
    return gradients_message(step=9, arrays=arrays, **arguments)


def moments(message: Gradients, index: int) -> Moments:
    finite = int(message.counts[index] - message.nonfinite[index])
    return Moments.from_scaled(
        finite, float(message.means[index]), float(message.m2[index]), int(message.exponents[index])
    )


def check(message: Gradients, index: int, gradient: Tensor) -> None:
    """Hold one parameter's partials by float64, within the tolerance of docs/metrics.md."""
    wide = gradient.to(torch.float32).to(torch.float64).numpy().reshape(-1)
    finite = wide[np.isfinite(wide)]
    assert message.counts[index] == wide.size
    assert message.nonfinite[index] == wide.size - finite.size
    assert message.zeros[index] == np.count_nonzero(finite == 0)
    assert message.absmax[index] == (np.abs(finite).max() if finite.size else 0.0)
    for values in (message.means, message.m2, message.absmax):
        assert math.isfinite(values[index])
    if not finite.size:
        assert message.means[index] == message.m2[index] == 0.0
        return
    got = moments(message, index)
    spread = float(finite.std())
    assert math.ldexp(got.mean, got.exponent) == pytest.approx(finite.mean(), rel=1e-5, abs=1e-5 * spread)
    assert math.ldexp(math.sqrt(got.m2 / finite.size), got.exponent) == pytest.approx(spread, rel=1e-5, abs=0.0)
    assert abs(got.mean) <= 1.0
    assert got.m2 <= finite.size


def plain_histogram(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count by the edges themselves, leaving out values so near an edge that float32 may see them beyond it."""
    finite = np.abs(values[np.isfinite(values) & (values != 0)])
    places = (np.log10(finite) + 12.0) * 4.0
    return np.bincount(np.clip(np.floor(places), 0, 63).astype(np.int64), minlength=64)


SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3, 5), (ROW,), (ROW + 1,), (2, ROW), (7, 11, 13), (4, 0, 2))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from(SHAPES))
    values = torch.randn(shape, generator=generator) + draw(st.sampled_from((0.0, 1.0, 1000.0)))
    values *= draw(st.sampled_from((1.0, 1e-30, 1e-6, 1e30, 0.0)))
    share = draw(st.sampled_from((0.0, 0.1, 1.0)))
    places = torch.rand(shape, generator=generator)
    values = torch.where(places < share * 0.3, torch.nan, values)
    values = torch.where((places >= share * 0.3) & (places < share * 0.6), torch.inf, values)
    values = torch.where((places >= share * 0.6) & (places < share), -torch.inf, values)
    values = torch.where(places > 0.9, 0.0, values)
    if draw(st.booleans()) and values.dim() > 1:
        values = values.transpose(0, 1)
    if draw(st.booleans()) and values.dim() == 2:
        values = values[:, ::2]
    return values.to(draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))))


@settings(deadline=None, max_examples=80)
@given(parts=st.lists(st.tuples(tensors(), st.integers(0, 2)), max_size=6))
def test_partials_are_those_of_float64(parts: list[tuple[Tensor, int]]) -> None:
    gradients = [LocalGradient(10 + index, module, tensor) for index, (tensor, module) in enumerate(parts)]
    before = [tensor.clone() for tensor, _ in parts]
    message = message_of(gradients)
    assert message.parameters.tolist() == [10 + index for index in range(len(parts))]
    for index, (tensor, _) in enumerate(parts):
        check(message, index, tensor)
        assert torch.equal(tensor.nan_to_num(), before[index].nan_to_num())
    modules = sorted({module for _, module in parts})
    assert message.histogram_modules.tolist() == modules
    assert message.histograms.shape == (len(modules), GRADIENT_HISTOGRAM_BINS)
    for row, module in zip(message.histograms, modules, strict=True):
        values = np.concatenate([t.float().double().numpy().reshape(-1) for t, m in parts if m == module])
        # Rounding of the logarithm may move a value across one edge, never further.
        assert np.abs(np.cumsum(row - plain_histogram(values))).max() <= 1 + values.size // 1000
        assert row.sum() == np.count_nonzero(np.isfinite(values) & (values != 0))


@pytest.mark.parametrize("ratio", [10.0, 1_000.0, 30_000.0])
def test_std_survives_a_mean_that_is_far_larger(ratio: float) -> None:
    gradient = torch.randn(300_000, generator=torch.Generator().manual_seed(1)) * 1e-4 + ratio * 1e-4
    check(message_of([LocalGradient(0, 0, gradient)]), 0, gradient)


def test_what_rounding_leaves_of_a_rows_centre_is_corrected() -> None:
    gradient = torch.randn(300_000, generator=torch.Generator().manual_seed(1)) * 1e-4 + 10.0
    message, wide = message_of([LocalGradient(0, 0, gradient)]), gradient.double()
    got, spread = moments(message, 0), wide.std(unbiased=False).item()
    assert math.ldexp(got.mean, got.exponent) == pytest.approx(wide.mean().item(), rel=0.0, abs=1e-4 * spread)
    assert math.ldexp(math.sqrt(got.m2 / got.count), got.exponent) == pytest.approx(spread, rel=5e-6)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-20, 1e20, 3e38])
def test_no_square_over_or_underflows(magnitude: float) -> None:
    signs = torch.tensor([1.0, -1.0, 0.5, 0.0]).repeat(700)
    gradient = (signs.double() * magnitude).float()
    message = message_of([LocalGradient(0, 0, gradient)])
    check(message, 0, gradient)
    assert moments(message, 0).m2 > 0


def test_a_wide_range_within_one_tensor_keeps_its_norm() -> None:
    gradient = torch.cat((torch.full((5000,), 1e-20), torch.full((10,), 1e15), torch.full((5000,), -3e-3)))
    message = message_of([LocalGradient(0, 0, gradient)])
    got = moments(message, 0)
    norm = math.ldexp(math.sqrt(got.m2 + got.count * got.mean**2), got.exponent)
    assert norm == pytest.approx(gradient.double().norm().item(), rel=1e-6)


def test_a_parameter_may_span_blocks_and_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_rows, "BLOCK_ROWS", 3)
    generator = torch.Generator().manual_seed(3)
    sizes = (5, 4 * ROW + 17, 2, 3 * ROW, 9 * ROW + 1)
    gradients = [
        LocalGradient(index, index % 2, torch.randn(size, generator=generator) + 100)
        for index, size in enumerate(sizes)
    ]
    message = message_of(gradients)
    for index, each in enumerate(gradients):
        check(message, index, each.gradient)
    assert message.histograms.sum() == sum(sizes)


def test_both_ways_of_counting_bins_agree() -> None:
    slots = torch.rand((37, ROW)) * 64
    on_host = gradient_rows._bin_counts(slots)
    counts = torch.zeros((64, ROW), dtype=torch.int32)
    one = torch.ones((1, 1), dtype=torch.int32).expand(slots.shape)
    assert torch.equal(counts.scatter_add_(0, slots.to(torch.int64), one).sum(dim=1), on_host)


def test_edges_of_the_histogram_take_what_lies_outside() -> None:
    gradient = torch.tensor([1e-30, 1e-13, 2e-12, 0.5, 9e3, 1e30, 0.0, math.nan])
    row = message_of([LocalGradient(0, 4, gradient)]).histograms[0]
    assert (row[0], row[1], row[46], row[63], row.sum()) == (2, 1, 1, 2, 6)


def test_the_rest_of_the_message() -> None:
    gradients = [LocalGradient(3, 0, torch.ones(2))]
    message = message_of(gradients, scale=torch.tensor(65536.0), without_gradient=[1, 2], clipped=True)
    assert (message.step, message.scale, message.clipped) == (9, 65536.0, True)
    assert message.without_gradient.tolist() == [1, 2]
    assert message_of([]).counts.size == 0
    assert message_of([], scale=2.0).scale == 2.0
    assert message_of([]).scale == 1.0


def test_sparse_and_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="dense and floating"):
        reduce_gradients([LocalGradient(0, 0, torch.eye(3).to_sparse())])
    with pytest.raises(TypeError, match="dense and floating"):
        reduce_gradients([LocalGradient(0, 0, torch.ones(3, dtype=torch.int64))])


def test_a_transposed_gradient_is_not_copied_before_its_rows_are() -> None:
    gradient = torch.randn(30, 40).t()
    assert gradients_module._flat(gradient).untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
