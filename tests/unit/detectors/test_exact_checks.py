"""Each exact check finds its failure within five steps, and says nothing of the nearest healthy run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.detector_traces import (
    EOS,
    IMAGE,
    PAD,
    Drawn,
    Failure,
    Task,
    changed,
    context,
    counted,
    trace,
    watched,
    with_ranks,
)

from sidestep.protocol.messages import Kind, Losses, StepEnd
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.records import Part
from sidestep.worker.step_record import StepRecord
from sidestep.worker.watch import Watch

ONSET = 8
TASK = Task(batch=32)
TWO_RANKS = with_ranks(TASK, 2)


def at_rank(rank: int, **changes: object) -> Failure:
    def fail(drawn: Drawn) -> None:
        drawn.rank_changes[rank] = changes

    return fail


def same_batch(period: int) -> Failure:
    def fail(drawn: Drawn) -> None:
        rng = np.random.default_rng(drawn.step % period)
        drawn.changes["sample_hashes"] = rng.integers(1, 2**62, drawn.task.batch)
        drawn.changes["image_hashes"] = rng.integers(1, 2**62, drawn.task.batch)

    return fail


def same_on_both(drawn: Drawn) -> None:
    hashes = np.random.default_rng(drawn.step).integers(1, 2**62, (2, 16))
    for rank in (0, 1):
        drawn.rank_changes[rank] = {"sample_hashes": hashes[0], "image_hashes": hashes[1]}


def few_distinct(drawn: Drawn) -> None:
    rng = np.random.default_rng(drawn.step)
    drawn.changes["sample_hashes"] = rng.integers(1, 2**62, 8)[rng.integers(0, 8, drawn.task.batch)]
    drawn.changes["image_hashes"] = np.zeros(0, np.int64)


def nan_weights(drawn: Drawn) -> None:
    drawn.rank_changes[1] = {"heartbeat": np.array([np.nan, 1.0], np.float32)}


def skipped(drawn: Drawn) -> None:
    drawn.applied = False


def no_rate(drawn: Drawn) -> None:
    drawn.rate = 0.0


def stuck_rank(drawn: Drawn) -> None:
    hashes = np.random.default_rng(0).integers(1, 2**62, (2, 16))
    drawn.rank_changes[1] = {"sample_hashes": hashes[0], "image_hashes": hashes[1]}


NAN = np.array([np.nan], np.float32)
FAILURES: dict[str, tuple[Task, Failure, str]] = {
    "a NaN loss": (TASK, changed(trainer_losses=NAN), "nonfinite"),
    "a NaN gradient": (TASK, changed(gradient_norm=NAN), "nonfinite"),
    "a NaN in one module": (TASK, changed(module_norms=np.array([0.1, np.nan, 1.0], np.float32)), "nonfinite"),
    "NaN weights in one rank": (TWO_RANKS, nan_weights, "nonfinite"),
    "no labels": (TASK, counted(labelled=0, batches_without_labels=1), "no_labels"),
    "one batch of NaN for want of labels": (
        TASK,
        lambda d: (counted(batches=2, batches_without_labels=1)(d), changed(trainer_losses=NAN)(d))[0],
        "no_labels",
    ),
    "labels at padding": (TASK, counted(labels_masked=3), "label_masked_pos"),
    "targets that are the padding id": (TASK, changed(targets=np.full(96, PAD, np.int32)), "pad_labelled"),
    "image placeholders as targets": (TASK, changed(targets=np.full(96, IMAGE, np.int32)), "image_tokens_labelled"),
    "labels that are not shifted": (TASK, counted(labels_equal_ids=96, labels_equal_next_ids=3), "label_leak"),
    "labels that are shifted twice": (TASK, counted(labels_equal_ids=2, labels_equal_next_ids=3), "label_alignment"),
    "answers without EOS": (TASK, counted(answers_with_eos=10), "no_stop_token"),
    "packed answers, of which many have no EOS": (
        TASK,
        counted(answers_with_eos=10, rows=4, rows_without_labels=0, answer_pairs=31, pairs_alike_before=31),
        "no_stop_token",
    ),
    "pieces of answers without EOS": (
        TASK,
        counted(answers=90, answers_with_eos=9, rows=32, rows_without_labels=0, answer_pairs=89, pairs_alike_before=40),
        "no_stop_token",
    ),
    "a stuck batch": (TASK, same_batch(1), "dup_batch"),
    "two batches in turn": (TASK, same_batch(2), "dup_batch"),
    "one rank's loader stuck": (TWO_RANKS, stuck_rank, "dup_batch"),
    "ranks with the same samples": (TWO_RANKS, same_on_both, "dup_ranks"),
    "a batch of few samples": (replace(TASK, images=False), few_distinct, "dup_in_batch"),
    "one image": (TASK, changed(image_hashes=np.full(32, 77)), "image_constant"),
    "black images": (TASK, changed(image_deviations=np.zeros(32, np.float32)), "image_constant"),
    "one rank's images": (TWO_RANKS, at_rank(1, image_hashes=np.full(16, 77)), "image_constant"),
    "a zeroed projector": (TASK, changed(projector_rms=0.0, projector_spread=0.0), "image_embed_zero"),
    "a projector that sees no image": (TASK, changed(projector_spread=0.0), "image_embed_constant"),
    "weights that stand": (TASK, changed(heartbeat=np.ones(8, np.float32)), "no_update"),
    "a rate of 0": (TASK, no_rate, "lr_zero"),
    "a gradient of 0": (TASK, changed(gradient_norm=np.zeros(1, np.float32)), "no_gradient"),
    "a module without gradient": (TASK, changed(module_norms=np.array([0.1, -1.0, 1.0], np.float32)), "module_dead"),
    "a module with almost none": (TASK, changed(module_norms=np.array([0.1, 1e-6, 1.0], np.float32)), "module_dead"),
    "ranks with other weights": (TWO_RANKS, at_rank(1, heartbeat=np.arange(8, dtype=np.float32)), "rank_desync"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_found_within_five_steps(kind: str) -> None:
    task, failure, name = FAILURES[kind]
    told = watched(trace(task, ONSET + 8, failure=failure, onset=ONSET))
    found = [step for step, opened in told.openings if opened == name]
    assert found, told.openings
    assert ONSET <= found[0] <= ONSET + 5
    assert told.openings[0][1] == name
    assert any("likely cause: " in line and "not known" not in line for line in told.blocks.splitlines())


NEED_A_PAST = {"a module with almost none", "two batches in turn"}


@pytest.mark.parametrize("kind", [kind for kind in FAILURES if kind not in NEED_A_PAST])
def test_a_failure_from_the_first_step_is_found_as_well(kind: str) -> None:
    task, failure, name = FAILURES[kind]
    told = watched(trace(task, 12, failure=failure))
    assert name in [opened for _, opened in told.openings], told.openings


def test_steps_that_are_skipped_for_ever_are_found() -> None:
    told = watched(trace(TASK, 60, failure=skipped, onset=20))
    assert told.openings[0][1] == "updates_skipped"
    assert 20 < told.openings[0][0] <= 40


def test_a_scaler_that_finds_its_factor_is_none() -> None:
    def fail(drawn: Drawn) -> None:
        drawn.applied = drawn.step >= 10 or drawn.step % 4 == 3
        drawn.changes["gradient_norm"] = np.array([np.inf if not drawn.applied else 1.0], np.float32)
        if not drawn.applied:
            drawn.changes["module_norms"] = np.full(3, np.inf, np.float32)

    assert not watched(trace(TASK, 60, failure=fail)).openings


def test_a_loss_that_is_no_number_is_found_at_a_due_step_of_an_old_trainer() -> None:
    step = next(trace(TASK, 1))
    due = Losses(step=0, microstep=0, labelled=2, losses=np.array([np.nan, 1.0], np.float32))
    told = watched([replace(step, parts={Kind.LOSSES: (Part(rank=0, message=due),)})])
    assert told.openings == [(0, "nonfinite")]


HEALTHY: dict[str, tuple[Task, Failure | None]] = {
    "as it is": (TASK, None),
    "labels left out by chance": (
        TASK,
        counted(
            answers=90, answers_with_eos=22, rows=32, rows_without_labels=0, answer_pairs=89, pairs_alike_before=40
        ),
    ),
    "eight answers": (replace(TASK, batch=8), None),
    "two ranks": (TWO_RANKS, None),
    "no images": (replace(TASK, images=False), None),
    "noise in the inputs": (TASK, counted(labels_equal_next_ids=80)),
    "counts that nobody knows": (
        TASK,
        counted(padding=-1, compared=-1, labels_equal_ids=-1, labels_equal_next_ids=-1, labels_masked=-1),
    ),
    "plain text without answers": (
        TASK,
        counted(positions=100, labelled=98, compared=98, labels_equal_next_ids=98, answers=8, answers_with_eos=0),
    ),
    "questions alike on many images": (TASK, changed(sample_hashes=np.resize([1, 2, 3], 32))),
    "several questions an image": (
        TASK,
        lambda d: changed(image_hashes=np.repeat(np.random.default_rng(d.step).integers(1, 2**62, 8), 4))(d),
    ),
    "some blank tiles": (TASK, changed(image_deviations=np.array([0.0] * 16 + [0.2] * 16, np.float32))),
    "images alike in one micro-batch": (
        TASK,
        lambda d: changed(
            projector_spread=0.0,
            image_hashes=np.resize(np.random.default_rng(d.step).integers(1, 2**62, 20), 32),
        )(d),
    ),
    "a frozen encoder": (
        TASK,
        changed(module_norms=np.array([-1.0, 0.1, 1.0], np.float32)),
    ),
    "text-only steps now and then": (
        TASK,
        lambda d: (
            changed(
                module_norms=np.array([0.0, 0.0, 1.0], np.float32),
                image_hashes=np.zeros(0, np.int64),
                image_deviations=np.zeros(0, np.float32),
            )(d)
            if d.step % 7 > 2
            else None
        ),
    ),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_nothing_is_said_of_what_is_healthy(kind: str) -> None:
    task, failure = HEALTHY[kind]
    table = {"modules": ["vision_encoder", "modality_projector", "language_model"]}
    rows = [{"name": "a", "module": place, "param": "w", "trainable": place > 0} for place in range(3)]
    where = {"parameters": {**table, "parameters": rows}} if kind == "a frozen encoder" else {}
    told = watched(trace(task, 40, failure=failure), None, **where)
    assert told.openings == []


def zero_start(drawn: Drawn) -> None:
    """A projector of zeros that a warm-up from a rate of 0 moves from its third step on."""
    if drawn.step < 2:
        changed(projector_rms=0.0, projector_spread=0.0, heartbeat=np.ones(8, np.float32))(drawn)
    drawn.rate = 1e-5 * drawn.step


def cosine_to_zero(drawn: Drawn) -> None:
    """The schedule's end: rates of almost 0 move no weight, and the last one is 0."""
    drawn.rate = max(0.0, 0.5e-3 * (1 + float(np.cos(np.pi * min(drawn.step, 200) / 200))))
    if drawn.step >= 190:
        changed(heartbeat=np.ones(8, np.float32))(drawn)


def slow_start_in_half_precision(drawn: Drawn) -> None:
    drawn.rate = 1e-8 * (drawn.step + 1)
    if drawn.step < 60:
        changed(heartbeat=np.ones(8, np.float32))(drawn)


@pytest.mark.parametrize("failure", [zero_start, cosine_to_zero, slow_start_in_half_precision])
def test_schedules_may_begin_and_end_at_nothing(failure: Callable[[Drawn], None]) -> None:
    assert watched(trace(TASK, 215, failure=failure)).openings == []


def test_a_small_set_in_order_is_no_stuck_loader() -> None:
    """Two batches an epoch, in the same order from the first step on: little data, but no failure."""
    assert watched(trace(TASK, 30, failure=same_batch(2))).openings == []


def test_a_module_is_frozen_with_an_announcement() -> None:
    def fail(drawn: Drawn) -> None:
        if drawn.step >= 20:
            changed(module_norms=np.array([-1.0, 0.1, 1.0], np.float32))(drawn)
        drawn.stage = "projector only" if drawn.step == 20 else ""

    assert watched(trace(TASK, 60, failure=fail)).openings == []


def test_an_eos_that_is_also_the_padding_may_be_a_target() -> None:
    tokenizer = {"eos_id": EOS, "pad_id": EOS}
    assert watched(trace(TASK, 20), tokenizer=tokenizer).openings == []


@pytest.mark.parametrize(("name", "is_expected"), [("MP", False), ("model.mp.proj", False), ("decoder", True)])
def test_a_text_run_leaves_the_image_s_side_without_gradient(name: str, is_expected: bool) -> None:
    """nanoVLM's projector is called MP: in a run without images it never has a gradient, which is as it should be."""
    norms = np.array([0.0, 1.0], np.float32)
    table = {"modules": [name, "other"], "parameters": [{"module": place} for place in (0, 1)]}
    told = watched(trace(replace(TASK, images=False), 20, failure=changed(module_norms=norms)), parameters=table)
    assert (told.openings != []) is is_expected


def test_a_tail_is_not_judged() -> None:
    watch = Watch()
    step = next(trace(TASK, 1, failure=changed(trainer_losses=NAN)))
    told = watched([replace(step, reason="tail", ends={0: StepEnd(step=0, unix_time=0.0)})], watch)
    assert told.openings == []


def start(losses: NDArray[np.float64], targets: NDArray[np.int64]) -> list[tuple[int, str]]:
    record = StepRecord(
        vocabulary=768,
        loss=float(losses.mean()),
        targets=targets.astype(np.int32),
        losses=losses.astype(np.float16),
        places=np.zeros(targets.size, np.uint8),
        rank_rows=np.array([targets.size], np.int32),
        ranks=np.zeros(1, np.int32),
    )
    found = Watch().observe_record(record, context())
    return [(record.step, each.title.partition(":")[0]) for each in found.announcements]


def test_a_start_over_few_distinct_targets_says_little() -> None:
    """Multiple choice: a letter, EOS and little else; logits with a deviation of 1 make their mean cost vary by 0.4."""
    few = np.tile([10, 11, 1, 1], 12)
    cost = np.log(768) + np.tile([7.4, 7.1, 3.2, 3.2], 12)
    assert cost.mean() > np.log(768) + DetectorSettings().init_loss.threshold
    assert start(cost, few) == []
    many = np.arange(48)
    assert start(np.full(48, np.log(768)) + 5.0 + 0.01 * (many % 7), many) == [(0, "init_loss")]
    assert start(np.tile([90.0, 120.0, 60.0, 75.0], 12), few) == [(0, "init_loss")], "embeddings far too large"


def test_weights_that_are_nan_are_not_said_to_stand() -> None:
    def fail(drawn: Drawn) -> None:
        changed(heartbeat=np.full(8, np.nan, np.float32), trainer_losses=NAN)(drawn)

    told = watched(trace(TASK, ONSET + 20, failure=fail, onset=ONSET))
    assert told.openings == [(ONSET, "nonfinite")]
    assert "no_update" not in told.blocks
    assert "an operation gave NaN" in told.blocks


def test_samples_that_all_stand_twice_are_a_method() -> None:
    def twins(drawn: Drawn) -> None:
        hashes = np.random.default_rng(drawn.step).integers(1, 2**62, (2, drawn.task.batch // 2))
        drawn.changes |= {"sample_hashes": np.tile(hashes[0], 2), "image_hashes": np.tile(hashes[1], 2)}

    assert watched(trace(TASK, 60, failure=twins)).openings == []


def test_blank_images_do_not_make_their_samples_repeats() -> None:
    def fail(drawn: Drawn) -> None:
        rng = np.random.default_rng(drawn.step)
        changed(
            sample_hashes=rng.choice([1, 2, 3, 4, 5], drawn.task.batch),
            image_hashes=np.full(drawn.task.batch, 77),
            image_deviations=np.zeros(drawn.task.batch, np.float32),
        )(drawn)

    told = watched(trace(TASK, 100, failure=fail, onset=70))
    assert told.openings[0] == (72, "image_constant")
    assert "images are lost or overwritten" in told.blocks
    assert "dup_in_batch" not in told.blocks
    assert "data_repeats" not in told.blocks
