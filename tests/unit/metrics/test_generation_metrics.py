"""``generation/*``: lengths before the first EOS, whatever the model filled in after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sidestep.protocol.messages import Generation, LearningRates
from sidestep.worker.metrics.generation import measure_generation
from sidestep.worker.metrics.learning_rate import measure_learning_rates
from sidestep.worker.metrics.sequences import TokenSequence, read_generated, target_sequences
from sidestep.worker.records import Part, RunContext

EOS = 2


def message(generated: dict[int, Sequence[int]], **fields: Any) -> Generation:
    lengths = [len(ids) for ids in generated.values()]
    return Generation(
        step=50,
        samples=np.array(list(generated), np.int32),
        offsets=np.array([0, *np.cumsum(lengths)], np.int64),
        ids=np.array([i for ids in generated.values() for i in ids], np.int32),
        **{"max_new_tokens": 5, "seconds": 0.5, **fields},
    )


def measure(*messages: Generation, eos_id: int | None = EOS) -> dict[str, Any]:
    generated = read_generated([Part(rank=i, message=m) for i, m in enumerate(messages)], eos_id)
    assert generated is not None
    return measure_generation(generated, 50).values


def test_lengths_are_those_before_the_first_eos() -> None:
    values = measure(message({0: [5, 6, EOS], 1: [EOS], 2: [1, 1, 1, 1, 1], 3: [7, EOS, EOS, EOS, EOS]}))
    assert values == {
        "generation/avg_length": (2 + 0 + 5 + 1) / 4,
        "generation/min_length": 0,
        "generation/max_length": 5,
        "generation/empty_ratio": 0.25,
        "generation/hit_max_ratio": 0.25,
        "generation/failed": 0,
        "generation/seconds": 0.5,
    }


def test_a_generation_that_ended_without_eos_below_the_limit_did_not_hit_it() -> None:
    assert measure(message({0: [5, 6]}))["generation/hit_max_ratio"] == 0.0
    assert measure(message({0: [5, 6, 7, 8, 9, EOS]}))["generation/hit_max_ratio"] == 0.0
    assert measure(message({0: [5, EOS, 6]}), eos_id=None)["generation/max_length"] == 3


def test_ranks_that_split_or_repeat_the_samples_give_each_once() -> None:
    whole = measure(message({0: [5, EOS], 1: [6, 6, EOS]}))
    assert measure(message({0: [5, EOS]}), message({1: [6, 6, EOS]})) == whole
    assert measure(message({0: [5, EOS], 1: [6, 6, EOS]}), message({1: [6, 6, EOS], 0: [5, EOS]})) == whole


def test_failures_are_counted_and_told() -> None:
    failed = message({0: [5, EOS]}, failed=np.array([1, 2], np.int32), failures=("ValueError: no image",))
    generated = read_generated([Part(rank=0, message=failed)], EOS)
    assert generated is not None
    found = measure_generation(generated, 50)
    assert found.values["generation/failed"] == 2
    assert found.values["generation/avg_length"] == 1.0
    assert "2 of 3 samples at step 50: ValueError: no image" in found.notices[0].text
    rescued = [Part(rank=0, message=failed), Part(rank=1, message=message({1: [5, EOS], 2: [5, EOS]}))]
    saved = read_generated(rescued, EOS)
    assert saved is not None
    assert saved.failed == ()


def test_when_all_failed_only_that_is_said() -> None:
    values = measure(message({}, failed=np.array([0], np.int32), failures=("boom",)))
    assert values == {"generation/failed": 1, "generation/seconds": 0.5}


@pytest.mark.parametrize(
    "broken",
    [
        {"offsets": np.array([0, 9], np.int64)},
        {"offsets": np.array([0], np.int64)},
        {"offsets": np.array([1, 2], np.int64)},
        {"offsets": np.array([], np.int64)},
        {"samples": np.array([0, 1, 2], np.int32)},
    ],
)
def test_parts_that_contradict_themselves_are_left_out_and_counted(broken: dict[str, Any]) -> None:
    bad = replace(message({0: [5, EOS]}), **broken)
    generated = read_generated([Part(rank=0, message=bad), Part(rank=1, message=message({3: [1]}))], EOS)
    assert generated is not None
    assert generated.samples == (3,)
    assert measure_generation(generated, 50).malformed_parts == 1
    assert read_generated([], EOS) is None


def test_targets_are_cut_the_same_way_and_unknown_ones_left_out() -> None:
    samples = {"samples": [{"target_ids": [5, EOS, 7]}, {"target_ids": []}, {}, {"target_ids": "x"}]}
    found = target_sequences(samples, [0, 1, 2, 3, 99, -1], EOS)
    assert found == (TokenSequence(content=(5,), has_ended=True),)
    assert target_sequences({}, [0], EOS) == ()


class NoText:
    """Nothing here has a text."""

    def token(self, token_id: int) -> str:
        raise AssertionError(token_id)

    def text(self, ids: Sequence[int]) -> str:
        raise AssertionError(ids)


def test_learning_rates_go_by_their_groups_names() -> None:
    context = RunContext(
        run_id="r", attempt=0, text=NoText(), groups={"names": ["modality_projector", "vision_encoder"]}
    )
    rates = LearningRates(step=25, rates=np.array([1e-3, float("nan"), 5e-5]))
    other = LearningRates(step=25, rates=np.array([9.0, 9.0, 9.0]))
    found = measure_learning_rates([Part(rank=0, message=rates), Part(rank=1, message=other)], context)
    assert found.values == {"lr/modality_projector": 1e-3, "lr/2": 5e-5}
    assert measure_learning_rates([], context).values == {}
