"""Gradient partials against float64, over every make of tensor that an optimizer sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from sidestep.trainer_hooks.kernels.choice import host_obstacle, kernels
from sidestep.trainer_hooks.kernels.host_build import COMPILE_SECONDS
from sidestep.trainer_hooks.kernels.host_launch import host_kernel
from sidestep.trainer_hooks.reductions import gradient_blocks, gradient_magnitudes, gradient_rows
from sidestep.trainer_hooks.reductions import gradients as gradients_module
from sidestep.trainer_hooks.reductions.gradient_magnitudes import MagnitudeCounter, float32_bits
from sidestep.trainer_hooks.reductions.gradient_pieces import ROW_ELEMENTS, Piece
from sidestep.trainer_hooks.reductions.gradient_rows import reduce_by_rows
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, gradients_message, reduce_gradients

torch.set_num_threads(1)

ROW = ROW_ELEMENTS


HAS_KERNEL = not host_obstacle()  # tests/unit/kernels/test_host_kernel.py says so where there is none
ON_HOST = ("blocks", "compiled") if HAS_KERNEL else ("blocks",)
WAYS = (*ON_HOST, "rows")


@contextmanager
def chosen(way: str) -> Iterator[None]:
    """Choose between the ways of the host's memory and that of any device's, which works on the host too."""

    def by_rows(pieces: Sequence[Piece], slots: int, modules: int) -> tuple[Tensor, Tensor]:
        return reduce_by_rows(gradient_blocks.HOST, pieces, slots, modules)

    with pytest.MonkeyPatch.context() as patch:
        if way == "compiled":
            assert host_kernel.wait(COMPILE_SECONDS)
        else:
            patch.setenv("SIDESTEP_KERNELS", "torch")
        if way == "rows":
            patch.setattr(gradients_module, "reduce_on_host", by_rows)
        yield
    assert not kernels.failures


def message_of(gradients: list[LocalGradient], way: str = "blocks", **arguments: Any) -> Gradients:
    scale = arguments.pop("scale", None)
    with chosen(way):
        reduced = reduce_gradients(gradients, scale)
    arrays = {name: part.numpy().copy() for name, part in reduced.items()}
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
SHAPES += ((4095,), (4096,), (3, 4099))


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
@given(parts=st.lists(st.tuples(tensors(), st.integers(0, 2)), max_size=6), way=st.sampled_from(WAYS))
def test_partials_are_those_of_float64(parts: list[tuple[Tensor, int]], way: str) -> None:
    gradients = [LocalGradient(10 + index, module, tensor) for index, (tensor, module) in enumerate(parts)]
    before = [tensor.clone() for tensor, _ in parts]
    message = message_of(gradients, way)
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", [0.5, 1.0, 10.0, 1_000.0, 30_000.0])
def test_std_survives_a_mean_that_is_far_larger(ratio: float, way: str) -> None:
    gradient = torch.randn(300_000, generator=torch.Generator().manual_seed(1)) * 1e-4 + ratio * 1e-4
    check(message_of([LocalGradient(0, 0, gradient)], way), 0, gradient)


@pytest.mark.parametrize("way", WAYS)
def test_what_rounding_leaves_of_a_rows_centre_is_corrected(way: str) -> None:
    gradient = torch.randn(300_000, generator=torch.Generator().manual_seed(1)) * 1e-4 + 10.0
    message, wide = message_of([LocalGradient(0, 0, gradient)], way), gradient.double()
    got, spread = moments(message, 0), wide.std(unbiased=False).item()
    assert math.ldexp(got.mean, got.exponent) == pytest.approx(wide.mean().item(), rel=0.0, abs=1e-4 * spread)
    assert math.ldexp(math.sqrt(got.m2 / got.count), got.exponent) == pytest.approx(spread, rel=5e-6)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-20, 1e20, 3e38])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("repeats", [700, 5000])
def test_no_square_over_or_underflows(magnitude: float, repeats: int, way: str) -> None:
    signs = torch.tensor([1.0, -1.0, 0.5, 0.0]).repeat(repeats)
    gradient = (signs.double() * magnitude).float()
    message = message_of([LocalGradient(0, 0, gradient)], way)
    check(message, 0, gradient)
    assert moments(message, 0).m2 > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_wide_range_within_one_tensor_keeps_its_norm(way: str) -> None:
    gradient = torch.cat((torch.full((5000,), 1e-20), torch.full((10,), 1e15), torch.full((5000,), -3e-3)))
    message = message_of([LocalGradient(0, 0, gradient)], way)
    got = moments(message, 0)
    norm = math.ldexp(math.sqrt(got.m2 + got.count * got.mean**2), got.exponent)
    assert norm == pytest.approx(gradient.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_may_span_blocks_and_share_them(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_rows, "BLOCK_ROWS", 3)
    monkeypatch.setattr(gradient_blocks, "BLOCK_ELEMENTS", 2 * gradient_blocks.SUMMED_ELEMENTS)
    generator = torch.Generator().manual_seed(3)
    sizes = (5, 4 * ROW + 17, 2, 3 * ROW, 3 * ROW + 1, 9 * ROW + 1, 3000)
    gradients = [
        LocalGradient(index, index % 2, torch.randn(size, generator=generator) + index * 25)
        for index, size in enumerate(sizes)
    ]
    message = message_of(gradients, way)
    for index, each in enumerate(gradients):
        check(message, index, each.gradient)
    assert message.histograms.sum() == sum(sizes)


BLOCK = gradient_blocks.BLOCK_ELEMENTS


def having(*places: tuple[int | slice, float]) -> Callable[[Tensor], Tensor]:
    """Return what puts values at places."""

    def put(values: Tensor) -> Tensor:
        for place, value in places:
            values[place] = value
        return values

    return put


FIRST = slice(0, BLOCK)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda values: values,
    "zeros": having((slice(0, None, 3), 0.0), (7, -0.0)),
    "nothing but zeros": having((slice(None), 0.0)),
    "zeros in one block": having((FIRST, 0.0)),
    "broken": having((5, math.inf), (9, -math.inf), (slice(11, None, 1000), math.nan)),
    "broken at the end": having((-1, math.nan)),
    "nothing is finite": having((slice(None), math.nan)),
    "one magnitude": lambda values: values.sign() * 0.1,
    "an outlier": having((BLOCK + 1, 3e30)),
    "above one": lambda values: values * 1e4,
    "far above one": lambda values: values * 1e9,
    "very small": lambda values: values * 1e-20,
    "subnormal": lambda values: values * 1e-37,
    "far from zero": lambda values: values + 2.0,
    "one block far from zero": lambda values: values + 2.0 * (torch.arange(values.numel()) < BLOCK),
    "every other": lambda values: values.repeat_interleave(2)[::2],
}


def large(kind: str) -> Tensor:
    """Return a tensor of two blocks, one element of which is alone in its row of sums."""
    return KINDS[kind](torch.randn(2 * BLOCK - 4095, generator=torch.Generator().manual_seed(5)) * 1e-4)


@pytest.mark.parametrize("way", ON_HOST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_several_blocks(kind: str, dtype: torch.dtype, way: str) -> None:
    values = large(kind).to(dtype)
    before = values.clone()
    beside = torch.full((3,), 1e-3)
    message = message_of([LocalGradient(0, 0, values), LocalGradient(1, 1, beside)], way)
    check(message, 0, values)
    check(message, 1, beside)
    wide = values.float().double().numpy()
    assert message.histograms[0].sum() == np.count_nonzero(np.isfinite(wide) & (wide != 0))
    assert np.abs(np.cumsum(message.histograms[0] - plain_histogram(wide))).max() <= 1 + values.numel() // 1000
    assert torch.equal(values.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("way", ON_HOST)
def test_all_ways_say_the_same_and_each_says_it_again(way: str) -> None:
    tensors = [large(kind) for kind in KINDS] + [torch.arange(size) * 1e-5 for size in (1, 77, 1000, 4095, 5000)]
    gradients = [LocalGradient(index, index % 3, tensor) for index, tensor in enumerate(tensors)]
    one, other, again = message_of(gradients, way), message_of(gradients, "rows"), message_of(gradients, way)
    for name in ("counts", "nonfinite", "zeros", "exponents", "absmax"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(one.means, other.means, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(one.m2, other.m2, rtol=2e-6)
    # A value within 7e-6 of a bin under an edge may count above it; most tensors here come of the same draw.
    near_an_edge = one.histograms.sum() // 200_000
    assert np.abs(np.cumsum(one.histograms - other.histograms, axis=1)).max() <= 3 + near_an_edge
    for name in ("means", "m2", "histograms"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name), err_msg=name)


@pytest.mark.parametrize("way", ON_HOST)
def test_the_number_of_threads_changes_nothing(way: str) -> None:
    gradients = [LocalGradient(0, 0, large("zeros")), LocalGradient(1, 0, large("one block far from zero"))]
    before = torch.get_num_threads()
    with chosen(way):
        one = reduce_gradients(gradients)
        torch.set_num_threads(2)
        try:
            two = reduce_gradients(gradients)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(one["sums"], two["sums"])
    assert torch.equal(one["histograms"], two["histograms"])


@pytest.mark.parametrize("logarithm", [gradient_magnitudes._numpy_log2, gradient_magnitudes._torch_log2])
@pytest.mark.parametrize("largest", [0.5, 300.0])
def test_every_edge_of_the_histogram(logarithm: Any, largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of counting, with and without magnitudes above 1, by either logarithm, to one part in 100,000."""
    monkeypatch.setattr(gradient_magnitudes, "_log2", logarithm)
    edges = 10.0 ** (np.arange(1, 64) / 4 - 12)
    edges = edges[edges < largest]
    below, above = (np.float32(edges * factor).repeat(3) for factor in (1 - 1e-5, 1 + 1e-5))
    for values, first_bin in ((below, 0), (above, 1)):
        magnitudes = np.append(values, np.float32(largest))
        counter, row = MagnitudeCounter(magnitudes.size), np.zeros(64, np.int64)
        counter.count(magnitudes, float32_bits(values.min()), float32_bits(largest), 0)
        counter.move_to(row)
        expected = np.zeros(64, np.int64)
        expected[first_bin : first_bin + edges.size] = 3
        expected[int(4 * (math.log10(largest) + 12))] += 1
        assert row.tolist() == expected.tolist()
        counter.move_to(row)  # nothing since
        assert row.sum() == expected.sum()


@pytest.mark.parametrize("way", ON_HOST)
def test_an_edge_itself_counts_upwards(way: str) -> None:
    values = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0])
    for tensor in (values, values[:4], values.repeat(1000)):
        row = message_of([LocalGradient(0, 0, tensor)], way).histograms[0]
        expected = np.zeros(64, np.int64)
        expected[32 : 32 + 4 * min(7, tensor.numel()) : 4] = max(1, tensor.numel() // 7)
        assert row.tolist() == expected.tolist()


def test_both_ways_of_counting_bins_agree() -> None:
    slots = torch.rand((37, ROW)) * 64
    assert torch.equal(gradient_rows._bin_counts(slots), torch.bincount(slots.flatten().to(torch.uint8), minlength=64))


@pytest.mark.parametrize("way", WAYS)
def test_edges_of_the_histogram_take_what_lies_outside(way: str) -> None:
    gradient = torch.tensor([1e-30, 1e-13, 2e-12, 0.5, 9e3, 1e30, 0.0, math.nan])
    row = message_of([LocalGradient(0, 4, gradient)], way).histograms[0]
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
