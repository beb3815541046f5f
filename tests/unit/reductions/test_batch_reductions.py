"""Tokens, answers and losses of random packed batches, against plain loops in float64."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from sidestep.protocol.limits import HIGHEST_TOKEN_CONTEXT_TOKENS, LOSS_HISTOGRAM_BINS, MAX_HIGHEST_TOKENS
from sidestep.protocol.messages import Losses, Role
from sidestep.trainer_hooks.reductions import cross_entropy as cross_entropy_module
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch, align
from sidestep.trainer_hooks.reductions.answers import answers_message, reduce_answers
from sidestep.trainer_hooks.reductions.loss import reduce_loss
from sidestep.trainer_hooks.reductions.loss_message import losses_message
from sidestep.trainer_hooks.reductions.tokens import reduce_tokens, tokens_message

torch.set_num_threads(1)

IGNORE, EOS, VOCABULARY = -100, 2, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch(AlignedBatch):
    """A batch that is treated as one on a device, so that the fixed-shape half runs where there is no GPU."""

    @property
    def on_host(self) -> bool:
        return False


@dataclass(frozen=True)
class Position:
    """A labelled position, as the reference sees it."""

    row: int
    place: int
    target: int
    roles: int
    document_start: int


@dataclass(frozen=True)
class Case:
    """A random batch and what its trainer would pass along."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    mask: NDArray[np.int64] | None
    documents: NDArray[np.int64]
    boundaries: str
    shifted: bool
    eos_id: int | None
    pad_id: int | None

    def arguments(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "input_ids": torch.from_numpy(self.ids),
            "labels": torch.from_numpy(self.labels),
            "attention_mask": None if self.mask is None else torch.from_numpy(self.mask),
            "shifted": self.shifted,
            "ignore_index": IGNORE,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
        }
        if self.boundaries == "documents":
            values["documents"] = torch.from_numpy(self.documents)
        elif self.boundaries == "position_ids":
            values["position_ids"] = torch.from_numpy(positions_of(self.documents))
        elif self.boundaries == "cu_seqlens":
            changes = np.flatnonzero(np.diff(self.documents.reshape(-1), prepend=-1))
            values["cu_seqlens"] = torch.from_numpy(np.append(changes, self.ids.size).astype(np.int32))
        return values

    def batch(self, *, device_half: bool) -> AlignedBatch:
        batch = align(**self.arguments())
        if not device_half:
            return batch
        return DeviceBatch(**{field.name: getattr(batch, field.name) for field in fields(batch)})

    def answers(self) -> list[list[Position]]:
        """Walk through the batch position by position."""
        answers: list[list[Position]] = []
        for row, labels in enumerate(self.labels):
            documents = self.documents[row] if self.boundaries else np.zeros(len(labels), np.int64)
            targets = list(labels) if self.shifted else [*labels[1:], IGNORE]
            open_run, ended = False, False
            for place, target in enumerate(targets):
                of_target = min(place + 1, len(labels) - 1)
                if documents[of_target] != documents[place]:
                    open_run = False
                if target == IGNORE:
                    open_run = False
                    continue
                roles = 0
                if not open_run:
                    answers.append([])
                    open_run, ended = True, False
                    roles |= Role.FIRST
                elif not ended:
                    roles |= Role.LATER
                if target == self.eos_id:
                    ended = True
                elif not ended:
                    roles |= Role.CONTENT
                start = int(np.flatnonzero(documents == documents[of_target])[0])
                answers[-1].append(Position(row, place, int(target), roles, start))
        return answers

    def is_real(self, row: int, place: int) -> bool:
        if self.mask is not None:
            return bool(self.mask[row, place] != 0)
        if self.pad_id is None or self.pad_id == self.eos_id:
            return True
        return bool(self.ids[row, place] != self.pad_id)


def positions_of(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    places = np.zeros_like(documents)
    for row, column in np.ndindex(documents.shape):
        same = column > 0 and documents[row, column] == documents[row, column - 1]
        places[row, column] = places[row, column - 1] + 1 if same else 0
    return places


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 14)))
    ids = generator.integers(0, VOCABULARY, shape)
    shifted = draw(st.booleans())
    labels = np.roll(ids, -1, axis=1) if shifted else ids.copy()
    labels[generator.random(shape) >= draw(st.sampled_from((0.0, 0.3, 0.8, 1.0)))] = IGNORE
    if shifted and draw(st.booleans()):  # nanoVLM leaves the last one out, others cut rows from a longer text
        labels[:, -1] = IGNORE
    # Every row begins a document of its own, as cumulated lengths over the flattened rows would have it.
    documents = np.cumsum(generator.random(shape) < 0.2, axis=1) + np.arange(shape[0])[:, None] * 100
    mask = (generator.random(shape) < 0.7).astype(np.int64) if draw(st.booleans()) else None
    return Case(
        ids=ids,
        labels=labels,
        mask=mask,
        documents=documents,
        boundaries=draw(st.sampled_from(("", "documents", "position_ids", "cu_seqlens"))),
        shifted=shifted,
        eos_id=draw(st.sampled_from((EOS, None))),
        pad_id=draw(st.sampled_from((EOS, 0, None))),
    )


def on_host(parts: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Do what staging does."""
    return {name: part.numpy(force=True).copy() for name, part in parts.items()}


def flattened(case: Case) -> list[Position]:
    return [position for answer in case.answers() for position in answer]


@settings(deadline=None, max_examples=80)
@given(case=cases(), device_half=st.booleans(), vocabulary=st.sampled_from((VOCABULARY, 4)))
def test_tokens_are_those_of_plain_counting(case: Case, device_half: bool, vocabulary: int) -> None:
    parts = reduce_tokens(case.batch(device_half=device_half), vocabulary)
    message = tokens_message(step=3, microstep=1, arrays=on_host(parts))

    def known(token: int) -> int:
        return token if token < vocabulary else -1

    real = [known(int(case.ids[at])) for at in np.ndindex(case.ids.shape) if case.is_real(*at)]
    padding_known = case.mask is not None or case.pad_id not in {None, case.eos_id}
    positions = flattened(case)
    content = Counter(known(each.target) for each in positions if each.roles & Role.CONTENT)
    labelled = Counter(known(each.target) for each in positions)
    assert dict(zip(message.real_ids.tolist(), message.real_counts.tolist(), strict=True)) == Counter(real)
    assert dict(zip(message.labelled_ids.tolist(), message.labelled_counts.tolist(), strict=True)) == labelled
    assert message.content_counts.tolist() == [content[token] for token in sorted(labelled)]
    assert message.real_ids.tolist() == sorted(set(real))
    assert (message.step, message.microstep, message.positions) == (3, 1, case.ids.size)
    assert message.padding == (case.ids.size - len(real) if padding_known else -1)
    assert message.answers == len(case.answers())


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(st.tuples(cases(), st.booleans()), max_size=4))
def test_answers_of_a_step_add_up_over_its_batches(steps: list[tuple[Case, bool]]) -> None:
    counts = [reduce_answers(case.batch(device_half=device_half)) for case, device_half in steps]
    parts = {str(number): each for number, each in enumerate(counts)}
    message = answers_message(step=5, epoch=2, arrays=on_host(parts))
    lengths = Counter(
        sum(1 for each in answer if each.roles & Role.CONTENT) for case, _ in steps for answer in case.answers()
    )
    assert message.lengths.tolist() == sorted(lengths)
    assert message.counts.tolist() == [lengths[length] for length in sorted(lengths)]
    assert message.labelled == sum(len(flattened(case)) for case, _ in steps)
    assert message.batches == len(steps)
    assert message.batches_without_labels == sum(1 for case, _ in steps if not flattened(case))
    assert (message.step, message.epoch) == (5, 2)


def plain_loss(logits: NDArray[Any], target: int) -> float:
    """Compute one loss in float64, as docs/metrics.md writes it."""
    wide = [float(each) for each in logits]
    if any(math.isnan(each) or each == math.inf for each in wide):
        return math.nan
    largest = max(wide)
    if largest == -math.inf:
        return math.nan
    return math.log(sum(math.exp(each - largest) for each in wide)) - (wide[target] - largest)


def make_logits(case: Case, seed: int, dtype: torch.dtype, *, hostile: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((*case.ids.shape, VOCABULARY), generator=generator) * 8
    if hostile:
        places = torch.rand(logits.shape, generator=generator)
        logits[places < 0.05] = math.nan
        logits[(places > 0.05) & (places < 0.1)] = math.inf
        logits[(places > 0.1) & (places < 0.3)] = -math.inf
    return logits.to(dtype)


def check_losses(message: Losses, case: Case, expected: dict[tuple[int, int], float]) -> None:
    """Hold every field of an unsampled message by the reference."""
    positions = flattened(case)
    want = np.array([expected[each.row, each.place] for each in positions])
    assert not message.sampled
    assert message.labelled == len(positions) == message.losses.size
    assert message.target_ids.tolist() == [each.target for each in positions]
    assert message.roles.tolist() == [each.roles for each in positions]
    np.testing.assert_allclose(message.losses, want, rtol=1e-5, atol=1e-6)
    finite = [index for index in range(len(positions)) if math.isfinite(message.losses[index])]
    order = sorted(finite, key=lambda index: (-message.losses[index], index))[:MAX_HIGHEST_TOKENS]
    assert message.highest.tolist() == order
    assert message.highest_losses.tolist() == message.losses[order].tolist()
    assert message.highest_targets.tolist() == [positions[index].target for index in order]
    for context, index in zip(message.contexts.tolist(), order, strict=True):
        assert context == plain_context(case, positions[index])


def plain_context(case: Case, position: Position) -> list[int]:
    context = []
    for place in range(position.place + 1 - HIGHEST_TOKEN_CONTEXT_TOKENS, position.place + 1):
        there = place >= max(0, position.document_start) and case.is_real(position.row, place)
        context.append(int(case.ids[position.row, place]) if there else -1)
    return context


@settings(deadline=None, max_examples=80)
@given(
    case=cases(),
    device_half=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    layout=st.sampled_from(("whole", "flat", "short", "strided")),
    hostile=st.booleans(),
    seed=st.integers(0, 99),
)
def test_losses_from_logits(
    *, case: Case, device_half: bool, dtype: torch.dtype, layout: str, hostile: bool, seed: int
) -> None:
    logits = make_logits(case, seed, dtype, hostile=hostile)
    given = {
        "whole": logits,
        "flat": logits.flatten(0, 1),
        "short": logits[:, :-1] if not case.shifted and logits.shape[1] > 1 else logits,
        "strided": logits.transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]
    before = logits.clone()
    parts = reduce_loss(case.batch(device_half=device_half), logits=given, trainer_loss=1.5, seed=seed)
    assert torch.equal(logits.isnan(), before.isnan())
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    message = losses_message(step=1, microstep=0, arrays=on_host(parts))
    wide = logits.to(torch.float64).numpy()
    expected = {(e.row, e.place): plain_loss(wide[e.row, e.place], e.target) for e in flattened(case)}
    check_losses(message, case, expected)
    assert message.trainer_loss.tolist() == [1.5]


@settings(deadline=None, max_examples=80)
@given(case=cases(), device_half=st.booleans(), layout=st.sampled_from(("whole", "flat", "short")))
def test_losses_of_the_caller(case: Case, device_half: bool, layout: str) -> None:
    given = torch.rand(case.ids.shape) * 5
    expected = {(e.row, e.place): float(given[e.row, e.place]) for e in flattened(case)}
    short = layout == "short" and not case.shifted
    passed = given[:, :-1] if short else given.flatten() if layout == "flat" else given
    parts = reduce_loss(case.batch(device_half=device_half), token_losses=passed, trainer_loss=torch.tensor(2.0))
    message = losses_message(step=1, microstep=0, arrays=on_host(parts))
    check_losses(message, case, expected)
    assert message.trainer_loss.tolist() == [2.0]


@settings(deadline=None, max_examples=60)
@given(case=cases(), device_half=st.booleans(), as_module=st.booleans(), max_rows=st.sampled_from((1, 4, 64)))
def test_losses_from_hidden_states_and_head(case: Case, device_half: bool, as_module: bool, max_rows: int) -> None:
    head = nn.Linear(5, VOCABULARY, bias=False)
    hidden = torch.randn((*case.ids.shape, 5))
    logits = head(hidden).detach().double().numpy()
    batch = case.batch(device_half=device_half)
    parts = reduce_loss(batch, hidden=hidden, head=head if as_module else head.weight, max_rows=max_rows, seed=3)
    message = losses_message(step=1, microstep=0, arrays=on_host(parts))
    positions = flattened(case)
    assert message.labelled == len(positions)
    assert message.losses.size == min(max_rows, len(positions))
    assert message.sampled == (len(positions) > max_rows)
    everything = [(e.target, e.roles, plain_loss(logits[e.row, e.place], e.target)) for e in positions]
    for loss, target, roles in zip(message.losses, message.target_ids, message.roles, strict=True):
        assert any(
            t == target and r == roles and loss == pytest.approx(x, rel=1e-5, abs=1e-6) for t, r, x in everything
        )


def wide_case(positions: int = 4096) -> Case:
    ids = np.arange(positions).reshape(1, -1) % VOCABULARY
    return Case(ids, ids.copy(), None, np.zeros_like(ids), "", True, EOS, None)


def test_both_halves_sample_the_same_positions_and_another_seed_others() -> None:
    case, taken = wide_case(), {}
    hidden, head = torch.randn((1, 4096, 3)), torch.randn((VOCABULARY, 3))
    for device_half in (False, True):
        for seed in (0, 1, 2**40):
            batch = case.batch(device_half=device_half)
            parts = on_host(reduce_loss(batch, hidden=hidden, head=head, max_rows=256, seed=seed))
            assert losses_message(step=0, microstep=0, arrays=parts).sampled
            taken[device_half, seed] = sorted(parts["rows"].tolist())
            assert len(set(taken[device_half, seed])) == 256
    assert all(taken[False, seed] == taken[True, seed] for seed in (0, 1, 2**40))
    assert len(set(taken[False, 0]) & set(taken[False, 1])) < 64
    # Spread over the row: no sixteenth of it is left out or holds more than three times its share.
    shares = np.bincount(np.array(taken[False, 0]) // 256, minlength=16)
    assert shares.min() > 0
    assert shares.max() < 48


def test_sampling_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    reduce_loss(wide_case().batch(device_half=True), logits=torch.zeros((1, 4096, VOCABULARY)), max_rows=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_are_reduced_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    case = wide_case(100)
    logits = torch.randn((1, 100, VOCABULARY))
    sizes: list[int] = []
    reduced = cross_entropy_module._reduced

    def watched(chunk: Tensor, targets: Tensor) -> Tensor:
        sizes.append(chunk.shape[0] * VOCABULARY * 8)
        return reduced(chunk, targets)

    whole = reduce_loss(case.batch(device_half=False), logits=logits)["losses"]
    monkeypatch.setattr(cross_entropy_module, "_reduced", watched)
    monkeypatch.setattr(cross_entropy_module, "CHUNK_BYTES", 1000)
    assert torch.equal(reduce_loss(case.batch(device_half=False), logits=logits)["losses"], whole)
    assert len(sizes) > 5
    assert max(sizes) <= 1000


def test_a_step_too_large_travels_as_histogram_and_partials() -> None:
    case = wide_case(200)
    losses = torch.linspace(0.0, 70.0, 200).reshape(1, -1)
    losses[0, 7], losses[0, 8] = math.nan, math.inf
    parts = on_host(reduce_loss(case.batch(device_half=False), token_losses=losses))
    message = losses_message(step=1, microstep=0, arrays=parts, exact_rows_limit=199)
    exact = losses_message(step=1, microstep=0, arrays=parts, exact_rows_limit=200)
    assert exact.losses.size == 200
    assert exact.histogram.size == exact.partials.size == 0
    assert message.losses.size == message.target_ids.size == message.roles.size == message.highest.size == 0
    assert message.highest_losses.tolist() == exact.highest_losses.tolist()
    assert np.array_equal(message.contexts, exact.contexts)
    assert not message.sampled

    finite = exact.losses[np.isfinite(exact.losses)].astype(np.float64)
    first = exact.losses[(exact.roles & Role.FIRST != 0) & np.isfinite(exact.losses)].astype(np.float64)
    later = exact.losses[(exact.roles & Role.LATER != 0) & np.isfinite(exact.losses)].astype(np.float64)
    count, mean, m2, least, most, nonfinite, firsts, first_sum, laters, later_sum = message.partials
    assert (count, nonfinite, firsts, laters) == (198, 2, first.size, later.size)
    assert mean == pytest.approx(finite.mean())
    assert math.sqrt(m2 / 197) == pytest.approx(finite.std(ddof=1))
    assert (least, most) == (finite.min(), finite.max())
    assert (first_sum, later_sum) == (pytest.approx(first.sum()), pytest.approx(later.sum()))
    assert message.histogram.shape == (LOSS_HISTOGRAM_BINS,)
    assert message.histogram.sum() == 198
    assert message.histogram[-1] == np.count_nonzero(finite >= 64.0 - 64.0 / LOSS_HISTOGRAM_BINS)


def test_partials_of_nothing_finite_are_zeros_beside_their_count() -> None:
    parts = on_host(reduce_loss(wide_case(4).batch(device_half=False), token_losses=torch.full((1, 4), math.nan)))
    message = losses_message(step=1, microstep=0, arrays=parts, exact_rows_limit=1)
    assert message.partials.tolist() == [0, 0, 0, 0, 0, 4, 0, 0, 0, 0]
    assert message.highest_losses.size == 0


def test_without_a_source_only_the_trainers_loss_travels() -> None:
    parts = on_host(reduce_loss(wide_case(4).batch(device_half=False), trainer_loss=torch.tensor(0.5)))
    message = losses_message(step=1, microstep=2, arrays=parts, reason="fused loss")
    assert (message.labelled, message.reason, message.trainer_loss.tolist()) == (4, "fused loss", [0.5])
    assert message.losses.size == 0


@pytest.mark.parametrize("device_half", [False, True])
def test_a_target_outside_the_vocabulary_is_nan_and_no_index_error(device_half: bool) -> None:
    case = wide_case(VOCABULARY)
    parts = reduce_loss(case.batch(device_half=device_half), logits=torch.zeros((1, VOCABULARY, 5)))
    message = losses_message(step=1, microstep=0, arrays=on_host(parts))
    assert np.isnan(message.losses).tolist() == [False] * 5 + [True] * 2


def test_negative_ids_are_counted_apart() -> None:
    ids = torch.tensor([[-200, 1, 1]])
    for kind in (AlignedBatch, DeviceBatch):
        batch = align(input_ids=ids, labels=ids, shifted=True)
        batch = kind(**{field.name: getattr(batch, field.name) for field in fields(batch)})
        message = tokens_message(step=0, microstep=0, arrays=on_host(reduce_tokens(batch, 3)))
        assert (message.real_ids.tolist(), message.real_counts.tolist()) == ([-1, 1], [1, 2])


def test_a_row_without_axis_and_a_batch_without_labels_or_ids() -> None:
    ids = torch.tensor([3, 4, 2])
    batch = align(input_ids=ids, labels=None, eos_id=2)
    assert batch.targets.shape == (1, 3)
    assert not batch.labelled.any()
    alone = align(input_ids=None, labels=torch.tensor([3, 4, 2]), shifted=True, eos_id=2)
    parts = reduce_loss(alone, logits=torch.zeros((1, 3, 5)))
    message = losses_message(step=0, microstep=0, arrays=on_host(parts))
    assert message.contexts.shape == (3, 0)
    assert message.losses == pytest.approx(np.full(3, math.log(5)))
    with pytest.raises(ValueError, match="input_ids"):
        reduce_tokens(alone, 5)
    with pytest.raises(ValueError, match="input_ids or labels"):
        align(input_ids=None, labels=None)


def test_a_mask_of_four_axes_counts_as_none() -> None:
    ids = torch.tensor([[0, 0, 5, 6]])
    batch = align(input_ids=ids, labels=ids, attention_mask=torch.zeros(1, 1, 4, 4), pad_id=0, eos_id=2)
    assert batch.real is not None
    assert batch.real.tolist() == [[False, False, True, True]]


def test_rotary_positions_of_several_axes_and_standing_images_are_one_document() -> None:
    ids = torch.tensor([[5, 6, 6, 6, 5, 5, 5]])
    temporal = torch.tensor([[0, 1, 1, 1, 2, 0, 1]])
    batch = align(input_ids=ids, labels=ids, position_ids=torch.stack((temporal, temporal, temporal)))
    assert batch.new_documents is not None
    assert batch.new_documents.tolist() == [[False] * 5 + [True, False]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"logits": torch.zeros(2, 3, 7)}, r"logits \(2, 3, 7\) do not go with labels \(1, 4\)"),
        ({"token_losses": torch.zeros(7)}, r"token_losses \(7,\) do not go"),
        ({"hidden": torch.zeros(1, 2, 5), "head": torch.zeros(7, 5)}, r"hidden \(1, 2, 5\) does not go"),
        ({"hidden": torch.zeros(1, 4, 5), "head": nn.ReLU()}, "needs a weight"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        reduce_loss(wide_case(4).batch(device_half=False), **arguments)


def test_labels_of_another_shape_than_the_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels \(1, 4\) do not go with input_ids \(1, 3\)"):
        align(input_ids=torch.zeros(1, 3, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64))


def test_ids_and_labels_are_not_shared_with_the_trainer() -> None:
    """Trainers overwrite their batches; the losses alone may be the caller's, until staging has copied them."""
    case = wide_case(8)
    arguments = case.arguments()
    for device_half in (False, True):
        batch = align(**arguments)
        if device_half:
            batch = DeviceBatch(**{field.name: getattr(batch, field.name) for field in fields(batch)})
        losses = torch.zeros((1, 8))
        parts = reduce_loss(batch, token_losses=losses) | reduce_tokens(batch, 5)
        theirs = {
            each.untyped_storage().data_ptr() for each in (*arguments.values(), losses) if isinstance(each, Tensor)
        }
        shared = {name for name, part in parts.items() if part.untyped_storage().data_ptr() in theirs}
        assert shared <= {"losses"}
