"""``loss/*`` against plain float64 arithmetic over every token."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sidestep.protocol.limits import LOSS_HISTOGRAM_BINS, LOSS_HISTOGRAM_MAX_NATS
from sidestep.protocol.messages import Losses, Role
from sidestep.worker.metrics.loss import measure_loss
from sidestep.worker.records import Part, RunContext

FIRST = int(Role.FIRST | Role.CONTENT)
LATER = int(Role.LATER | Role.CONTENT)
EOS = int(Role.LATER)
NEWLINE = 0


class Numbers:
    """Ids as numbers."""

    def token(self, token_id: int) -> str:
        return f"t{token_id}"

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(map(self.token, ids))


CONTEXT = RunContext(run_id="r", attempt=0, text=Numbers())


def batch(losses: Sequence[float], roles: Sequence[int], **fields: Any) -> Losses:
    return Losses(
        step=25,
        microstep=0,
        labelled=fields.pop("labelled", len(losses)),
        losses=np.array(losses, np.float32),
        target_ids=np.arange(len(losses), dtype=np.int32),
        roles=np.array(roles, np.uint8),
        **fields,
    )


def measure(*batches: Losses, **options: Any) -> dict[str, Any]:
    return measure_loss([Part(rank=i, message=b) for i, b in enumerate(batches)], CONTEXT, **options).values


def test_a_step_by_hand() -> None:
    one = batch([2.0, 0.5, 0.25, 8.0], [FIRST, LATER, EOS, NEWLINE], trainer_loss=np.array([2.5], np.float32))
    two = batch([4.0, 0.75], [FIRST, EOS], trainer_loss=np.array([3.5], np.float32))
    values = measure(one, two)
    losses = [2.0, 0.5, 0.25, 8.0, 4.0, 0.75]
    assert values["loss/total"] == pytest.approx(statistics.fmean(losses), rel=1e-12)
    assert values["loss/first_token"] == 3.0
    assert values["loss/later_tokens"] == 0.5  # without the newline after EOS
    assert values["loss/first_vs_later_ratio"] == 6.0
    assert values["loss/std"] == pytest.approx(statistics.stdev(losses), rel=1e-12)
    assert (values["loss/max"], values["loss/min"]) == (8.0, 0.25)
    assert values["loss/high_loss_token_ratio"] == 0.0
    assert values["loss/nonfinite_tokens"] == 0
    assert values["loss/exact"] == 1
    assert values["loss/trainer"] == 3.0
    assert "loss/sampled_tokens" not in values


def test_high_losses_are_those_over_mean_plus_two_std() -> None:
    losses = [1.0] * 30 + [9.0]
    values = measure(batch(losses, [LATER] * 31))
    assert statistics.fmean(losses) + 2 * statistics.stdev(losses) < 9.0
    assert values["loss/high_loss_token_ratio"] == 1 / 31
    assert measure(batch(losses, [LATER] * 31), high_loss_sigmas=100.0)["loss/high_loss_token_ratio"] == 0.0


def test_nonfinite_losses_are_counted_and_left_out_of_all_else() -> None:
    values = measure(batch([1.0, math.nan, math.inf, 3.0], [FIRST, FIRST, LATER, LATER]))
    assert values["loss/nonfinite_tokens"] == 2
    assert values["loss/total"] == 2.0
    assert (values["loss/first_token"], values["loss/later_tokens"]) == (1.0, 3.0)
    assert values["loss/max"] == 3.0
    only = measure(batch([math.nan], [FIRST]))
    assert only == {"loss/nonfinite_tokens": 1, "loss/exact": 1}


def test_one_token_has_no_std_and_no_later() -> None:
    values = measure(batch([1.5], [FIRST]))
    assert values["loss/total"] == values["loss/first_token"] == values["loss/min"] == values["loss/max"] == 1.5
    absent = {"loss/std", "loss/high_loss_token_ratio", "loss/later_tokens", "loss/first_vs_later_ratio"}
    assert not absent & values.keys()


def test_zero_later_loss_has_no_ratio() -> None:
    values = measure(batch([1.0, 0.0], [FIRST, LATER]))
    assert values["loss/later_tokens"] == 0.0
    assert "loss/first_vs_later_ratio" not in values


def test_no_labelled_token_leaves_only_what_the_trainer_said() -> None:
    values = measure(batch([], [], trainer_loss=np.array([math.nan], np.float32)))
    assert values == {"loss/trainer_nonfinite": 1}


def test_the_trainers_own_number_is_the_mean_of_its_finite_micro_batches() -> None:
    said = [batch([1.0], [FIRST], trainer_loss=np.array([v], np.float32)) for v in (1.0, 2.0, math.inf)]
    values = measure(*said)
    assert values["loss/trainer"] == 1.5
    assert values["loss/trainer_nonfinite"] == 1


def test_no_per_token_losses_say_why() -> None:
    fused = batch([], [], labelled=7, reason="the loss is fused", trainer_loss=np.array([2.0], np.float32))
    found = measure_loss([Part(rank=0, message=fused)], CONTEXT)
    assert found.values == {"loss/trainer": 2.0}
    assert "the loss is fused" in found.notices[0].text


def test_a_sample_stands_for_the_labelled_tokens_that_it_was_drawn_from() -> None:
    sampled = batch([1.0, 3.0], [FIRST, LATER], sampled=True, labelled=6)
    whole = batch([5.0, 6.0, 7.0], [FIRST, LATER, LATER])
    values = measure(sampled, whole)
    weights = [3.0, 3.0, 1.0, 1.0, 1.0]
    losses = [1.0, 3.0, 5.0, 6.0, 7.0]
    mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / 9
    squares = sum(w * (x - mean) ** 2 for w, x in zip(weights, losses, strict=True)) / 9
    assert values["loss/total"] == pytest.approx(mean, rel=1e-12)
    assert values["loss/std"] == pytest.approx(math.sqrt(squares * 5 / 4), rel=1e-12)
    assert values["loss/first_token"] == pytest.approx((3 * 1.0 + 5.0) / 4, rel=1e-12)
    assert values["loss/sampled_tokens"] == 5
    assert values["loss/exact"] == 0
    assert not {"loss/min", "loss/max"} & values.keys()


def test_a_rank_without_losses_makes_the_step_a_sample_of_itself() -> None:
    values = measure(batch([1.0, 2.0], [FIRST, LATER]), batch([], [], labelled=5, reason="no logits"))
    assert values["loss/sampled_tokens"] == 2
    assert values["loss/exact"] == 0
    assert "loss/max" not in values


def as_partials(losses: NDArray[np.float64], roles: NDArray[np.uint8]) -> Losses:
    """What the trainer's side makes of a micro-batch that is too large, written out plainly."""
    finite = losses[np.isfinite(losses)]
    first = losses[np.isfinite(losses) & ((roles & int(Role.FIRST)) != 0)]
    later = losses[np.isfinite(losses) & ((roles & int(Role.LATER)) != 0)]
    counts = [0] * LOSS_HISTOGRAM_BINS
    for loss in finite:
        counts[min(int(loss / LOSS_HISTOGRAM_MAX_NATS * LOSS_HISTOGRAM_BINS), LOSS_HISTOGRAM_BINS - 1)] += 1
    moments = [len(finite), finite.mean(), ((finite - finite.mean()) ** 2).sum(), finite.min(), finite.max()]
    sums = [losses.size - finite.size, first.size, first.sum(), later.size, later.sum()]
    empty = batch([], [], labelled=losses.size)
    return replace(empty, histogram=np.array(counts, np.int64), partials=np.array([*moments, *sums], np.float64))


def test_a_step_too_large_is_merged_from_partials_and_says_so() -> None:
    random = np.random.default_rng(3)
    losses = [random.gamma(2.0, 1.0, 4000).astype(np.float32).astype(np.float64) for _ in range(3)]
    losses[1][5] = 80.0  # over the histogram's edge
    losses[2][7] = math.nan
    roles = [random.choice(np.array([FIRST, LATER, NEWLINE], np.uint8), 4000) for _ in range(3)]
    merged = measure(
        as_partials(losses[0], roles[0]), as_partials(losses[1], roles[1]), batch(list(losses[2]), list(roles[2]))
    )
    exact = measure(*(batch(list(x), list(r)) for x, r in zip(losses, roles, strict=True)))
    assert (merged["loss/exact"], exact["loss/exact"]) == (0, 1)
    for name in (
        "total",
        "std",
        "first_token",
        "later_tokens",
        "first_vs_later_ratio",
        "min",
        "max",
        "nonfinite_tokens",
    ):
        assert merged[f"loss/{name}"] == pytest.approx(exact[f"loss/{name}"], rel=1e-12), name
    assert merged["loss/high_loss_token_ratio"] == pytest.approx(exact["loss/high_loss_token_ratio"], abs=3e-3)


def test_over_the_limit_exact_parts_are_merged_too() -> None:
    values = measure(batch([1.0, 2.0], [FIRST, LATER]), batch([3.0], [FIRST]), max_exact_tokens=2)
    assert values["loss/exact"] == 0
    assert values["loss/total"] == 2.0
    assert values["loss/std"] == 1.0
    assert measure(batch([1.0, 2.0], [FIRST, LATER]), max_exact_tokens=2)["loss/exact"] == 1


def test_highest_tokens_are_the_largest_over_all_parts_with_their_context() -> None:
    one = batch(
        [0.5, 4.0, 2.0],
        [LATER] * 3,
        highest=np.array([1, 2, 99], np.int32),
        contexts=np.array([[-1, 5], [5, 1], [0, 0]], np.int32),
    )
    two = batch([3.0, math.nan], [LATER] * 2)  # proposes nothing itself
    found = measure_loss([Part(rank=0, message=one), Part(rank=1, message=two)], CONTEXT)
    (table,) = found.tables
    assert table.key == "loss/highest_tokens"
    assert table.columns == ("token", "context", "loss", "rank")
    assert table.rows == (("t1", "t5", 4.0, 0), ("t0", "", 3.0, 1), ("t2", "t5 t1", 2.0, 0))


def test_highest_tokens_of_a_histogram_come_beside_it_and_are_at_most_32() -> None:
    large = as_partials(np.linspace(0.0, 5.0, 100), np.zeros(100, np.uint8))
    proposed = np.arange(40, 0, -1).astype(np.float32)
    large = replace(large, highest_losses=proposed, highest_targets=np.arange(40, dtype=np.int32))
    (table,) = measure_loss([Part(rank=3, message=large)], CONTEXT).tables
    assert len(table.rows) == 32
    assert table.rows[0] == ("t0", "", 40.0, 3)


@pytest.mark.parametrize(
    "broken",
    [
        {"roles": np.zeros(1, np.uint8)},
        {"target_ids": np.zeros(9, np.int32)},
        {"labelled": -1},
        {"histogram": np.ones(5, np.int64)},
        {"histogram": np.ones(LOSS_HISTOGRAM_BINS, np.int64), "partials": np.zeros(10)},
        {"histogram": np.zeros(LOSS_HISTOGRAM_BINS, np.int64), "partials": np.full(10, math.nan)},
        {"histogram": np.zeros(LOSS_HISTOGRAM_BINS, np.int64), "partials": np.zeros(3)},
    ],
)
def test_parts_that_contradict_themselves_are_left_out_and_counted(broken: dict[str, Any]) -> None:
    good = batch([1.0, 2.0], [FIRST, LATER])
    found = measure_loss([Part(rank=0, message=good), Part(rank=1, message=replace(good, **broken))], CONTEXT)
    assert found.malformed_parts == 1
    assert found.values["loss/total"] == 1.5
