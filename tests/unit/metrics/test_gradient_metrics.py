"""``gradients/*`` against numpy's float64 over whole gradients, however they were sharded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS, GRADIENT_HISTOGRAM_LOG10_RANGE
from sidestep.protocol.messages import Gradients
from sidestep.worker.metrics.gradients import measure_gradients
from sidestep.worker.metrics.measurement import Measurement
from sidestep.worker.metrics.parameters import ParameterRow
from sidestep.worker.records import Part, RunContext

LOW, HIGH = GRADIENT_HISTOGRAM_LOG10_RANGE
Share = tuple[tuple[int, ...], tuple[int, ...]]


class NoText:
    """Nothing here has a text."""

    def token(self, token_id: int) -> str:
        raise AssertionError(token_id)

    def text(self, ids: Sequence[int]) -> str:
        raise AssertionError(ids)


def row(name: str, module: int, shape: Sequence[int], share: Share | None = None, *, trainable: bool = True) -> Any:
    offset, local = share or ((0,) * len(shape), tuple(shape))
    return {
        "name": f"net.{name}",
        "module": module,
        "param": name.replace(".", "_"),
        "shape": list(shape),
        "numel": math.prod(shape),
        "offset": list(offset),
        "local_shape": list(local),
        "trainable": trainable,
        "group": 0,
    }


def table(rows: Sequence[Any], modules: Sequence[str] = ("vision", "decoder")) -> dict[str, Any]:
    return {"modules": list(modules), "parameters": list(rows)}


def context(first: dict[str, Any], others: dict[int, dict[str, Any]] | None = None) -> RunContext:
    return RunContext(run_id="r", attempt=0, text=NoText(), parameters=first, parameters_by_rank=others or {})


def counts_of_log10(values: NDArray[np.float64]) -> list[int]:
    counts = [0] * GRADIENT_HISTOGRAM_BINS
    for value in np.abs(values[np.isfinite(values) & (values != 0)]):
        place = int((math.log10(value) - LOW) / (HIGH - LOW) * GRADIENT_HISTOGRAM_BINS)
        counts[min(max(place, 0), GRADIENT_HISTOGRAM_BINS - 1)] += 1
    return counts


def report(shares: dict[int, NDArray[np.float64]], module_of: dict[int, int], **fields: Any) -> Gradients:
    """Parameter number to this rank's share of its gradient, as the trainer's side reduces it."""
    finite = {number: share[np.isfinite(share)].ravel() for number, share in shares.items()}
    exponents = {n: int(np.frexp(np.abs(f).max(initial=0.0))[1]) for n, f in finite.items()}
    scaled = {n: np.ldexp(f, -exponents[n]) for n, f in finite.items()}
    modules = sorted({module_of[n] for n in shares})
    histograms = [
        np.sum([counts_of_log10(shares[n].ravel()) for n in shares if module_of[n] == module], axis=0)
        for module in modules
    ]
    return Gradients(
        step=100,
        parameters=np.array(list(shares), np.int32),
        counts=np.array([share.size for share in shares.values()], np.int64),
        nonfinite=np.array([shares[n].size - finite[n].size for n in shares], np.int64),
        zeros=np.array([(finite[n] == 0).sum() for n in shares], np.int64),
        exponents=np.array([exponents[n] for n in shares], np.int32),
        means=np.array([s.mean() if s.size else 0.0 for s in scaled.values()], np.float64),
        m2=np.array([((s - s.mean()) ** 2).sum() if s.size else 0.0 for s in scaled.values()], np.float64),
        absmax=np.array([np.abs(f).max(initial=0.0) for f in finite.values()], np.float64),
        histogram_modules=np.array(modules, np.int32),
        histograms=np.array(histograms, np.int64).reshape(len(modules), GRADIENT_HISTOGRAM_BINS),
        **fields,
    )


RANDOM = np.random.default_rng(11)
WEIGHT = RANDOM.normal(1e-3, 1e-2, (6, 4))
WEIGHT[0, 0] = 0.0
BIAS = RANDOM.normal(0.0, 1.0, 3)
SCALAR = np.array([2.5])
MODULES = {0: 0, 1: 1, 2: 1}
WHOLE = table([row("blocks.0.weight", 0, (6, 4)), row("bias", 1, (3,)), row("gain", 1, (1,))])


def expect_reference(found: Measurement) -> None:
    """All of the three gradients, plainly."""
    expected = {}
    for prefix, gradient in (("vision/blocks_0_weight", WEIGHT), ("decoder/bias", BIAS)):
        expected[f"gradients/{prefix}/norm"] = math.sqrt(float((gradient**2).sum()))
        expected[f"gradients/{prefix}/mean"] = float(gradient.mean())
        expected[f"gradients/{prefix}/std"] = float(gradient.std(ddof=1))
        expected[f"gradients/{prefix}/max"] = float(np.abs(gradient).max())
    expected |= {"gradients/decoder/gain/norm": 2.5, "gradients/decoder/gain/mean": 2.5}
    expected |= {"gradients/decoder/gain/max": 2.5}
    norms = [float(np.linalg.norm(g)) for g in (WEIGHT, BIAS, SCALAR)]
    expected["gradients/vision/norm"] = norms[0]
    expected["gradients/decoder/norm"] = math.hypot(norms[1], norms[2])
    expected["gradients/global/total_norm"] = math.hypot(*norms)
    expected["gradients/global/avg_norm"] = sum(norms) / 3
    expected["gradients/global/nonfinite"] = 0
    expected["gradients/global/zero_ratio"] = 1 / 28
    expected["gradients/global/params_without_grad"] = 0
    expected["gradients/global/clipped"] = 0
    numbers = {key: value for key, value in found.values.items() if not isinstance(value, dict)}
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value, rel=1e-12), key


def histogram_counts(found: Measurement, module: str) -> list[int]:
    value = found.values[f"gradients/{module}/log10_histogram"]
    assert isinstance(value, dict)
    assert len(value["edges"]) == len(value["counts"]) + 1
    return list(value["counts"])


def test_one_rank_and_its_replicas_give_the_same() -> None:
    whole = report({0: WEIGHT, 1: BIAS, 2: SCALAR}, MODULES)
    for num_ranks in (1, 3):
        found = measure_gradients([Part(rank=r, message=whole) for r in range(num_ranks)], context(WHOLE))
        expect_reference(found)
        assert histogram_counts(found, "vision") == counts_of_log10(WEIGHT)
        assert sum(histogram_counts(found, "vision")) == 23  # the zero has no logarithm


def test_uneven_shards_are_merged_into_the_whole() -> None:
    def sharded(weight: Share, bias: Share) -> dict[str, Any]:
        return table([row("blocks.0.weight", 0, (6, 4), weight), row("bias", 1, (3,), bias), row("gain", 1, (1,))])

    tables = {
        0: sharded(((0, 0), (3, 4)), ((0,), (2,))),
        1: sharded(((3, 0), (2, 4)), ((2,), (1,))),
        2: sharded(((5, 0), (1, 4)), ((3,), (0,))),
        3: sharded(((6, 0), (0, 4)), ((3,), (0,))),  # nothing is left for the last rank
    }
    parts = [
        Part(rank=0, message=report({0: WEIGHT[:3], 1: BIAS[:2], 2: SCALAR}, MODULES)),
        Part(rank=1, message=report({0: WEIGHT[3:5], 1: BIAS[2:], 2: SCALAR}, MODULES)),
        Part(rank=2, message=report({0: WEIGHT[5:], 1: BIAS[3:], 2: SCALAR}, MODULES)),
        Part(rank=3, message=report({0: WEIGHT[6:], 1: BIAS[3:], 2: SCALAR}, MODULES)),
    ]
    found = measure_gradients(parts, context(tables[0], tables))
    expect_reference(found)
    assert histogram_counts(found, "vision") == counts_of_log10(WEIGHT)
    # the replicated gain is in every rank's histogram of its module: it cannot be counted once, so it is absent
    assert "gradients/decoder/log10_histogram" not in found.values


def test_histograms_of_shards_are_summed_over_ranks_that_hold_nothing_of_a_parameter() -> None:
    def sharded(weight: Share, bias: Share) -> dict[str, Any]:
        return table([row("w", 0, (6, 4), weight), row("b", 0, (1,), bias)])

    tables = {
        0: sharded(((0, 0), (2, 4)), ((0,), (1,))),
        1: sharded(((2, 0), (2, 4)), ((1,), (0,))),
        2: sharded(((4, 0), (2, 4)), ((1,), (0,))),
    }
    shares = [{0: WEIGHT[2 * r : 2 * r + 2], 1: SCALAR[r:]} for r in range(3)]
    parts = [Part(rank=r, message=report(shares[r], {0: 0, 1: 0})) for r in range(3)]
    found = measure_gradients(parts, context(tables[0], tables))
    assert histogram_counts(found, "vision") == counts_of_log10(np.concatenate([WEIGHT.ravel(), SCALAR]))


def test_a_missing_shard_is_said_and_its_parameter_left_out() -> None:
    tables = {
        0: table([row("w", 0, (6, 4), ((0, 0), (3, 4))), row("bias", 1, (3,))]),
        1: table([row("w", 0, (6, 4), ((3, 0), (3, 4))), row("bias", 1, (3,))]),
    }
    alone = report({0: WEIGHT[:3], 1: BIAS}, {0: 0, 1: 1})
    found = measure_gradients([Part(rank=0, message=alone)], context(tables[0], tables))
    assert found.values["gradients/global/params_incomplete"] == 1
    assert found.values["gradients/decoder/bias/norm"] == pytest.approx(np.linalg.norm(BIAS), rel=1e-12)
    absent = {"gradients/vision/w/norm", "gradients/vision/norm", "gradients/global/total_norm"}
    assert not absent & found.values.keys()
    assert "net.w" in found.notices[0].text


SHARING = {rank: {"copy": 0, "shares": 2} for rank in range(2)}


def halves(*, first: bool) -> dict[int, dict[str, Any]]:
    """Two ranks with half of ``w`` each, and ``bias`` whole on both, of which the first one counts."""
    whole = {**row("bias", 1, (3,)), **({} if first else {"first": True})}
    copy = {**row("bias", 1, (3,)), "first": False}
    return {
        0: table([row("w", 1, (6, 4), ((0, 0), (3, 4))), whole]),
        1: table([row("w", 1, (6, 4), ((3, 0), (3, 4))), copy]),
    }


def sharing(tables: dict[int, dict[str, Any]]) -> RunContext:
    return replace(context(tables[0], tables), topologies=SHARING)


def without_copies(sent: Gradients, gradients: Sequence[NDArray[np.float64]]) -> Gradients:
    """The histogram of what the rank holds first alone."""
    counts = np.sum([counts_of_log10(gradient.ravel()) for gradient in gradients], axis=0)
    return replace(sent, histograms=counts[None].astype(np.int64))


def test_a_share_that_two_ranks_hold_is_in_the_first_ones_histogram_alone() -> None:
    parts = [
        Part(rank=0, message=report({0: WEIGHT[:3], 1: BIAS}, {0: 1, 1: 1})),
        Part(rank=1, message=without_copies(report({0: WEIGHT[3:], 1: BIAS}, {0: 1, 1: 1}), [WEIGHT[3:]])),
    ]
    for first in (True, False):
        found = measure_gradients(parts, sharing(halves(first=first)))
        assert histogram_counts(found, "decoder") == counts_of_log10(np.concatenate([WEIGHT.ravel(), BIAS]))
        assert found.values["gradients/global/coverage"] == 1.0
        assert "gradients/global/params_apart" not in found.values
    missing = measure_gradients(parts[:1], sharing(halves(first=True)))
    assert missing.values["gradients/global/coverage"] == pytest.approx(15 / 27)
    assert "gradients/decoder/log10_histogram" not in missing.values
    assert missing.values["gradients/decoder/bias/norm"] == pytest.approx(np.linalg.norm(BIAS), rel=1e-12)


def test_copies_of_a_share_that_say_different_things_are_named() -> None:
    parts = [
        Part(rank=0, message=report({0: WEIGHT[:3], 1: BIAS}, {0: 1, 1: 1})),
        Part(rank=1, message=report({0: WEIGHT[3:], 1: 0.9 * BIAS}, {0: 1, 1: 1})),
    ]
    found = measure_gradients(parts, sharing(halves(first=True)))
    assert found.values["gradients/global/params_apart"] == 1
    assert found.values["gradients/decoder/bias/norm"] == pytest.approx(np.linalg.norm(BIAS), rel=1e-12)
    [said] = [notice.text for notice in found.notices if notice.code == "gradients_apart"]
    assert "ranks 0 and 1 hold the same share of net.bias" in said
    rounded = [parts[0], Part(rank=1, message=report({0: WEIGHT[3:], 1: 1.001 * BIAS}, {0: 1, 1: 1}))]
    assert "gradients/global/params_apart" not in measure_gradients(rounded, sharing(halves(first=True))).values


def test_partial_gradients_are_left_out_with_the_norms_that_they_belong_to() -> None:
    partial = np.array([1], np.int32)
    parts = [
        Part(rank=0, message=report({0: WEIGHT[:3]}, {0: 0}, partial=partial)),
        Part(rank=1, message=report({0: WEIGHT[3:]}, {0: 0}, partial=partial)),
    ]
    tables = {rank: table([row("w", 0, (6, 4), ((3 * rank, 0), (3, 4))), row("norm", 1, (3,))]) for rank in range(2)}
    found = measure_gradients(parts, sharing(tables))
    assert found.values["gradients/global/params_partial"] == 1
    assert found.values["gradients/global/params_without_grad"] == 0
    assert found.values["gradients/vision/w/norm"] == pytest.approx(np.linalg.norm(WEIGHT), rel=1e-12)
    assert not {"gradients/decoder/norm", "gradients/global/total_norm"} & found.values.keys()
    assert found.notices[0].level == "info"
    broken = Part(rank=0, message=report({0: WEIGHT[:3]}, {0: 0}, partial=np.array([2], np.int32)))
    assert measure_gradients([broken], sharing(tables)).malformed_parts == 1


def test_the_grad_scalers_factor_is_undone_everywhere() -> None:
    scale = 2.0**16
    scaled = report({0: WEIGHT * scale, 1: BIAS * scale, 2: SCALAR * scale}, MODULES, scale=scale)
    found = measure_gradients([Part(rank=0, message=scaled)], context(WHOLE))
    expect_reference(found)
    histogram = found.values["gradients/vision/log10_histogram"]
    assert isinstance(histogram, dict)
    middle = sum(
        count * (low + high) / 2
        for count, low, high in zip(histogram["counts"], histogram["edges"], histogram["edges"][1:], strict=False)
    ) / sum(histogram["counts"])
    assert middle == pytest.approx(float(np.log10(np.abs(WEIGHT[WEIGHT != 0])).mean()), abs=0.13)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    broken = WEIGHT.copy()
    broken[1, 1], broken[2, 2] = math.nan, math.inf
    hopeless = np.full(3, math.nan)
    found = measure_gradients(
        [Part(rank=0, message=report({0: broken, 1: hopeless, 2: SCALAR}, MODULES))], context(WHOLE)
    )
    finite = broken[np.isfinite(broken)]
    assert found.values["gradients/global/nonfinite"] == 5
    assert found.values["gradients/vision/blocks_0_weight/norm"] == pytest.approx(np.linalg.norm(finite), rel=1e-12)
    assert found.values["gradients/vision/blocks_0_weight/std"] == pytest.approx(finite.std(ddof=1), rel=1e-12)
    assert not any(key.startswith("gradients/decoder/bias/") for key in found.values)


def test_tiny_and_huge_gradients_neither_under_nor_overflow() -> None:
    small = table([row("tiny", 0, (2,)), row("huge", 0, (2,))])
    tiny, huge = np.array([1e-44, 3e-44]), np.array([3e38, 1e38])
    found = measure_gradients([Part(rank=0, message=report({0: tiny, 1: huge}, {0: 0, 1: 0}))], context(small))
    assert found.values["gradients/vision/tiny/norm"] == pytest.approx(math.sqrt(10) * 1e-44, rel=1e-12, abs=0.0)
    assert found.values["gradients/vision/huge/norm"] == pytest.approx(math.sqrt(10) * 1e38, rel=1e-12)


def test_parameters_without_gradient_are_absent_and_counted_once() -> None:
    part = report({1: BIAS}, MODULES, without_gradient=np.array([0, 2], np.int32), clipped=True)
    other = report({1: BIAS, 2: SCALAR}, MODULES, without_gradient=np.array([0], np.int32))
    found = measure_gradients([Part(rank=0, message=part), Part(rank=1, message=other)], context(WHOLE))
    assert found.values["gradients/global/params_without_grad"] == 1
    assert found.values["gradients/global/clipped"] == 1
    assert "gradients/vision/blocks_0_weight/norm" not in found.values
    assert found.values["gradients/global/avg_norm"] == pytest.approx((np.linalg.norm(BIAS) + 2.5) / 2, rel=1e-12)


def test_blocks_and_modules_are_coarser() -> None:
    rows = [
        row(n, 0, (4,)) for n in ("blocks.0.attn.weight", "blocks.0.mlp.weight", "blocks.1.attn.weight", "head.weight")
    ]
    gradients = {i: np.arange(4.0) + i for i in range(4)}
    part = Part(rank=0, message=report(gradients, dict.fromkeys(range(4), 0)))
    blocks = measure_gradients([part], context(table(rows)), detail="block").values
    both = np.concatenate([gradients[0], gradients[1]])
    assert blocks["gradients/vision/blocks_0/norm"] == pytest.approx(np.linalg.norm(both), rel=1e-12)
    assert blocks["gradients/vision/blocks_0/std"] == pytest.approx(both.std(ddof=1), rel=1e-12)
    assert {"gradients/vision/blocks_1/max", "gradients/vision/head_weight/mean"} <= blocks.keys()
    modules = measure_gradients([part], context(table(rows)), detail="module").values
    assert {key for key in modules if key.startswith("gradients/vision/")} == {
        "gradients/vision/norm",
        "gradients/vision/log10_histogram",
    }
    names = ("global/total_norm", "global/avg_norm", "vision/norm")
    assert all(modules[f"gradients/{name}"] == blocks[f"gradients/{name}"] for name in names)


def test_over_2000_charts_the_details_move_into_one_table() -> None:
    rows = [row(f"layer.{i}.weight", 0, (1,) if i == 0 else (2,)) for i in range(600)]
    gradients = {i: np.array([1.0] if i == 0 else [1.0, 2.0]) for i in range(600)}
    part = Part(rank=0, message=report(gradients, dict.fromkeys(range(600), 0)))
    found = measure_gradients([part], context(table(rows)))
    assert sum(key.endswith("/norm") for key in found.values) == 600 + 1
    assert not any(key.endswith(("/mean", "/std", "/max")) for key in found.values)
    (details,) = found.tables
    assert (details.key, len(details.rows)) == ("gradients/details", 600)
    assert details.columns == ("module", "param", "norm", "mean", "std", "max")
    assert details.rows[0] == ("vision", "layer_0_weight", 1.0, 1.0, None, 1.0)
    assert details.rows[1] == ("vision", "layer_1_weight", pytest.approx(5**0.5), 1.5, pytest.approx(0.5**0.5), 2.0)
    assert [notice.code for notice in found.notices] == ["gradient_details_in_table"]
    one_present = Part(rank=0, message=report({1: gradients[1]}, {1: 0}))
    assert "gradients/vision/layer_1_weight/mean" not in measure_gradients([one_present], context(table(rows))).values


@pytest.mark.parametrize(
    "broken",
    [
        {"parameters": np.array([0, 1, 7], np.int32)},
        {"parameters": np.array([0], np.int32)},
        {"nonfinite": np.array([999, 0, 0], np.int64)},
        {"zeros": np.array([-1, 0, 0], np.int64)},
        {"exponents": np.array([2**30, 0, 0], np.int32)},
        {"means": np.array([math.nan, 0, 0])},
        {"m2": np.array([-1.0, 0, 0])},
        {"absmax": np.array([math.inf, 0, 0])},
        {"scale": 0.0},
        {"scale": math.inf},
        {"without_gradient": np.array([-1], np.int32)},
        {"histograms": np.zeros((1, 3), np.int64)},
    ],
)
def test_parts_that_contradict_themselves_or_the_table_are_left_out_and_counted(broken: dict[str, Any]) -> None:
    good = report({0: WEIGHT, 1: BIAS, 2: SCALAR}, MODULES)
    bad = Part(rank=0, message=replace(good, **broken))
    assert measure_gradients([bad], context(WHOLE)).malformed_parts == 1
    found = measure_gradients([bad, Part(rank=1, message=good)], context(WHOLE))
    assert found.malformed_parts == 1
    expect_reference(found)


@pytest.mark.parametrize("unusable", [{}, {"modules": ["a"], "parameters": [{"module": 4}]}, {"parameters": 5}])
def test_without_a_usable_table_nothing_is_shown_and_all_is_counted(unusable: dict[str, Any]) -> None:
    found = measure_gradients([Part(rank=0, message=report({0: WEIGHT}, MODULES))], context(unusable))
    assert (found.values, found.malformed_parts) == ({}, 1)


@pytest.mark.parametrize(
    ("param", "block"),
    [("blocks_3_attn_weight", "blocks_3"), ("0_weight", "0"), ("ln_f_weight", "ln_f_weight"), ("conv2d_w", "conv2d_w")],
)
def test_a_block_is_the_name_up_to_its_first_number(param: str, block: str) -> None:
    described = ParameterRow(name=param, module="m", param=param, numel=1, shard=((), ()), trainable=True)
    assert described.block == block
