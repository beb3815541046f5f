from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.detector_traces import EOS, Task, assembled, context, draw, logged, probe, trace

from sidestep.protocol.errors import DecodeError
from sidestep.protocol.messages import SIGNAL_COUNTS, Kind, Losses, Probe, Signals, StepEnd
from sidestep.worker.detectors.view import StepView
from sidestep.worker.record_building import build_record
from sidestep.worker.records import AssembledStep, Part
from sidestep.worker.step_record import MAX_RECORD_BYTES, MAX_RECORD_ROWS, StepRecord


def step_of(*signals: Signals, **changes: object) -> AssembledStep:
    parts = {Kind.SIGNALS: tuple(Part(rank=rank, message=message) for rank, message in enumerate(signals))}
    told = {"run_id": "run", "attempt": 0, "step": 3, "reason": "complete", "parts": parts, **changes}
    return AssembledStep(**told)  # type: ignore[arg-type]


def signals(rows: int = 4, **changes: object) -> Signals:
    values = {
        "step": 3,
        "counts": np.arange(11),
        "labelled": rows,
        "vocabulary": 100,
        "targets": np.arange(rows, dtype=np.int32),
        "predictions": np.arange(rows, dtype=np.int32),
        "losses": np.ones(rows, np.float16),
        "entropies": np.full(rows, 0.5, np.float16),
        "places": (np.arange(rows) % 2).astype(np.uint8),
        "top_probability": 0.5,
        "mean_ids": np.array([1, 2], np.int32),
        "mean_probabilities": np.array([0.6, 0.2], np.float32),
        **changes,
    }
    return Signals(**values)  # type: ignore[arg-type]


def test_the_largest_record_stays_within_its_bound() -> None:
    step = next(trace(Task(options=500, length=30, batch=256, ranks=64), 1))
    values = {f"metric/{number:03d}": float(number) for number in range(100)}
    parts = {**step.parts, Kind.SCALARS: (Part(rank=0, message=logged(0, values)),)}
    parts[Kind.PROBE] = (Part(rank=0, message=probe(0, 0.5)),)
    record = build_record(replace(step, parts=parts), context())
    assert record.targets.size == MAX_RECORD_ROWS
    assert record.seen_rows == 256 * 32
    assert int(record.rank_rows.sum()) == MAX_RECORD_ROWS
    assert record.ranks.tolist()[-1] == -1, "ranks beyond the limit are one"
    assert len(record.logged) == 16
    assert len(record.as_bytes()) <= MAX_RECORD_BYTES


def test_a_record_comes_back_from_its_bytes_as_it_was() -> None:
    for step in trace(Task(ranks=3), 3):
        record = build_record(step, context())
        again = StepRecord.from_bytes(record.as_bytes())
        assert again == record
        assert hash(again) == hash(record)
        assert again.targets.tolist() == record.targets.tolist()
        assert again.losses.tolist() == record.losses.tolist()
        assert again.counts == record.counts


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x93\x01\x02\x03", StepRecord().as_bytes()[:-4]])
def test_bytes_that_are_no_record_are_refused(content: bytes) -> None:
    with pytest.raises(DecodeError):
        StepRecord.from_bytes(content)


def test_ranks_are_weighted_by_what_their_rows_stand_for() -> None:
    light = signals(4, losses=np.full(4, 1.0, np.float16), labelled=4)
    heavy = signals(4, losses=np.full(4, 3.0, np.float16), labelled=12)
    record = build_record(step_of(light, heavy), context())
    assert record.loss == pytest.approx((1.0 * 4 + 3.0 * 12) / 16)
    assert record.labelled == 16
    assert record.ranks.tolist() == [0, 1]
    assert record.rank_rows.tolist() == [4, 4]
    assert record.count("positions") == 0
    assert record.count("batches_without_labels") == 20


def test_the_mean_prediction_is_merged_and_its_targets_counted() -> None:
    first = signals(mean_ids=np.array([1, 2], np.int32), mean_probabilities=np.array([0.6, 0.2], np.float32))
    second = signals(mean_ids=np.array([3, 1], np.int32), mean_probabilities=np.array([0.5, 0.1], np.float32))
    record = build_record(step_of(first, second), context())
    assert dict(zip(record.mean_ids.tolist(), record.mean_probabilities.tolist(), strict=True)) == pytest.approx(
        {1: 0.35, 3: 0.25, 2: 0.1}
    )
    assert record.mean_shares.tolist() == pytest.approx([0.25, 0.25, 0.25])
    # An id that a rank does not name has at most the least it names: 0.2 and 0.1, half each.
    assert record.mean_slack == pytest.approx(0.15)
    assert record.mean_rest == pytest.approx(0.15)


def test_copies_of_a_rank_count_once() -> None:
    topologies = {0: {"data_parallel_rank": 0}, 1: {"data_parallel_rank": 0}}
    record = build_record(step_of(signals(), signals()), context(topologies=topologies))
    assert record.seen_rows == 4
    assert record.duplicate_ranks == ()


def test_what_is_no_number_is_counted_and_left_out() -> None:
    losses = np.array([1.0, np.nan, np.inf, 2.0], np.float16)
    sent = signals(losses=losses, trainer_losses=np.array([np.nan, 1.5], np.float32))
    due = Losses(step=3, microstep=0, labelled=2, losses=np.array([np.nan, 1.0], np.float32))
    step = step_of(sent)
    record = build_record(replace(step, parts={**step.parts, Kind.LOSSES: (Part(rank=0, message=due),)}), context())
    assert record.losses.tolist() == [1.0, 2.0]
    assert record.nonfinite_losses == 3
    assert record.nonfinite_trainer_losses == 1
    assert record.loss == pytest.approx(1.5 * 4 / 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": np.ones(3, np.float16)},
        {"predictions": np.zeros(3, np.int32)},
        {"places": np.zeros(0, np.uint8)},
        {"targets": np.full(4, -5, np.int32)},
        {"targets": np.full(4, 2**30, np.int32)},
    ],
)
def test_rows_that_contradict_each_other_are_absent(changes: dict[str, object]) -> None:
    record = build_record(step_of(signals(4, **changes)), context())
    assert record.targets.size == 0
    assert record.loss is None


def test_what_one_rank_lacks_nobody_has() -> None:
    record = build_record(step_of(signals(), signals(entropies=np.zeros(0, np.float16))), context())
    assert record.entropies.size == 0
    assert record.entropy is None
    assert record.predictions.size == 8


@pytest.mark.parametrize(
    ("ids", "values"),
    [
        ([1, 2], [0.7, np.nan]),
        ([1, 2], [0.9, 0.9]),
        ([1, 1], [0.2, 0.2]),
        ([1, -2], [0.2, 0.2]),
        ([1], [0.2, 0.2]),
    ],
)
def test_a_mean_prediction_that_is_none_is_absent(ids: list[int], values: list[float]) -> None:
    sent = signals(mean_ids=np.array(ids, np.int32), mean_probabilities=np.array(values, np.float32))
    record = build_record(step_of(sent), context())
    assert record.mean_ids.size == 0
    assert record.targets.size == 4


def test_unknown_counts_are_absent() -> None:
    counts = np.array([5, -1, 3, 3, 0, 3, -1, 2, 2], np.int64)  # an older trainer's, shorter
    record = build_record(step_of(signals(counts=counts)), context())
    assert record.count("padding") is None
    assert record.count("labels_masked") is None
    assert record.count("batches") is None
    assert record.count("answers_with_eos") == 2


def test_prompts_are_counted_by_the_ranks_that_have_some() -> None:
    known = ({"answers": 8, "answers_beside_prompts": 8, "prompt_ends": 2}, {"answers": 8})
    told = [signals(counts=np.array([rank.get(name, -1) for name in SIGNAL_COUNTS], np.int64)) for rank in known]
    record = build_record(step_of(*told), context())
    assert record.count("answers") == 16
    assert (record.count("answers_beside_prompts"), record.count("prompt_ends")) == (8, 2)
    assert record.count("prompt_ends_labelled") is None


def test_an_old_trainer_makes_an_empty_record() -> None:
    record = build_record(AssembledStep(run_id="run", attempt=0, step=5, reason="complete"), context())
    assert record == StepRecord(step=5, eos_id=EOS, pad_id=0, image_token_id=3)
    assert StepView(record).starts.size == 0


def test_the_step_s_own_facts_come_from_its_ends() -> None:
    ends = {0: StepEnd(step=3, unix_time=0.0, applied=False, stage="sft"), 1: StepEnd(step=3, unix_time=0.0)}
    sent = signals(gradient_norm=np.array([np.inf], np.float32))
    record = build_record(step_of(sent, ends=ends), context())
    assert record.applied is False
    assert record.stage == "sft"
    assert record.nonfinite_gradients == 0, "a skipped step's infinite gradient is how a scaler finds its factor"
    ends = {0: StepEnd(step=3, unix_time=0.0)}
    assert build_record(step_of(sent, ends=ends), context()).nonfinite_gradients == 1


def test_weights_are_compared_only_where_they_are_the_same_ones() -> None:
    weights = np.array([1.0, 2.0], np.float32)
    same = signals(heartbeat=weights, heartbeat_digest=7)
    other = signals(heartbeat=weights + 1e-7 * 4, heartbeat_digest=7)
    shard = signals(heartbeat=weights * 2, heartbeat_digest=8)
    broken = signals(heartbeat=np.array([np.nan, 1.0], np.float32), heartbeat_digest=9)
    record = build_record(step_of(same, other, shard, broken), context())
    assert record.desynced_ranks == (1,)
    assert record.nonfinite_weight_ranks == (3,)


def test_probes_of_ranks_are_one() -> None:
    parts = (
        Part(rank=0, message=Probe(step=3, loss=1.0, rolled_loss=2.0, labelled=30, images=4)),
        Part(rank=1, message=Probe(step=3, loss=2.0, rolled_loss=2.0, labelled=10, images=4)),
        Part(rank=2, message=Probe(step=3, loss=float("nan"), rolled_loss=2.0, labelled=10, images=4)),
    )
    record = build_record(step_of(parts={Kind.PROBE: parts}), context())
    assert record.probe_loss == pytest.approx(1.25)
    assert record.probe_rolled_loss == pytest.approx(2.0)


def test_content_ends_before_the_first_eos_of_each_answer() -> None:
    task = Task(length=2, batch=6)
    record = build_record(assembled(draw(task, 4, np.random.default_rng(0))), context())
    view = StepView(record)
    assert view.starts.tolist() == [0, 4, 8, 12, 16, 20]
    assert view.content.tolist() == [True, True, False, False] * 6
    nameless = StepView(replace(record, eos_id=-1))
    assert nameless.content.tolist() == [True, True, True, False] * 6, "without an EOS, what ends nearly all answers"
