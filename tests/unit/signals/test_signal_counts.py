"""Exact counts and hashes: the host's and the device's are one rule, and each broken pipeline moves its own count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidestep.protocol.messages import SIGNAL_COUNTS
from sidestep.trainer_hooks.reductions.alignment import align
from sidestep.trainer_hooks.signals.counts import (
    DeviceHash,
    Reading,
    add_counts,
    count_on_device,
    count_on_host,
    hash_on_host,
)
from sidestep.trainer_hooks.signals.prompt_ends import common_end

PAD, EOS, IGNORE = 0, 1, -100


def batch(seed: int, rows: int = 5, positions: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels (not shifted) and mask: a prompt, an answer with an EOS, padding."""
    draw = np.random.default_rng(seed)
    ids = np.full((rows, positions), PAD, np.int64)
    labels = np.full((rows, positions), IGNORE, np.int64)
    for row in range(rows):
        prompt, answer = int(draw.integers(3, 9)), int(draw.integers(1, 8))
        ids[row, : prompt + answer] = draw.integers(2, 40, prompt + answer)
        ids[row, prompt + answer] = EOS
        labels[row, prompt : prompt + answer + 1] = ids[row, prompt : prompt + answer + 1]
    return torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy((ids != PAD).astype(np.int64))


def reading(*, shifted: bool, pad_id: int | None = PAD, prompt_end: tuple[int, ...] = ()) -> Reading:
    return Reading(shifted=shifted, ignore_index=IGNORE, eos_id=EOS, pad_id=pad_id, prompt_end=prompt_end)


def host(labels: torch.Tensor, ids: torch.Tensor | None, mask: torch.Tensor | None, how: Reading) -> dict[str, int]:
    arrays = [None if tensor is None else tensor.numpy() for tensor in (ids, mask)]
    return dict(zip(SIGNAL_COUNTS, count_on_host(how, labels.numpy(), *arrays).tolist(), strict=True))


def shift(labels: torch.Tensor) -> torch.Tensor:
    moved = labels.roll(-1, dims=1)
    moved[:, -1] = IGNORE
    return moved


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("pad_id", [PAD, EOS, None])
@pytest.mark.parametrize("num_end", [0, 1, 2])
def test_host_and_device_count_alike(
    seed: int, shifted: bool, with_mask: bool, pad_id: int | None, num_end: int
) -> None:
    ids, labels, mask = batch(seed)
    first = int((labels[1] != IGNORE).to(torch.int8).argmax())
    end = tuple(ids[1, first - num_end : first].tolist())
    labels = shift(labels) if shifted else labels
    labels[0] = IGNORE
    given = mask if with_mask else None
    aligned = align(input_ids=ids, labels=labels, attention_mask=given, shifted=shifted, pad_id=pad_id, eos_id=EOS)
    on_device = dict(zip(SIGNAL_COUNTS, count_on_device(aligned, end).tolist(), strict=True))
    assert on_device == host(labels, ids, given, reading(shifted=shifted, pad_id=pad_id, prompt_end=end))
    assert on_device["prompt_ends_labelled"] >= 1 if end else on_device["prompt_ends"] == -1


@pytest.mark.parametrize("shifted", [False, True])
def test_a_healthy_batch(shifted: bool) -> None:
    ids, labels, mask = batch(3)
    counts = host(shift(labels) if shifted else labels, ids, mask, reading(shifted=shifted))
    assert counts["compared"] == counts["labels_equal_next_ids"] == counts["labelled"] > 0
    assert counts["labels_equal_ids"] < counts["labelled"] / 2
    assert counts["labels_masked"] == counts["batches_without_labels"] == 0
    assert counts["answers"] == counts["answers_with_eos"] == 5
    assert counts["padding"] == int((mask == 0).sum())


def test_each_fault_moves_its_own_count() -> None:
    ids, labels, mask = batch(4)
    leaked = host(ids.where(labels != IGNORE, IGNORE), ids, mask, reading(shifted=True))
    assert leaked["labels_equal_ids"] == leaked["labelled"]
    twice = host(shift(labels), ids, mask, reading(shifted=False))
    assert twice["labels_equal_next_ids"] < 0.5 * twice["compared"]
    padded = labels.where(mask == 1, PAD)
    assert host(padded, ids, mask, reading(shifted=False))["labels_masked"] == int((mask[:, 1:] == 0).sum())
    assert host(padded, ids, None, reading(shifted=False, pad_id=EOS))["padding"] == -1
    endless = labels.where(labels != EOS, IGNORE)
    assert host(endless, ids, mask, reading(shifted=False))["answers_with_eos"] == 0
    empty = host(torch.full_like(labels, IGNORE), ids, mask, reading(shifted=False))
    assert (empty["labelled"], empty["batches_without_labels"]) == (0, 1)
    assert empty["rows_without_labels"] == empty["rows"] == len(labels)
    some = labels.clone()
    some[1:3] = IGNORE
    assert host(some, ids, mask, reading(shifted=False))["rows_without_labels"] == 2
    headed = torch.cat((ids[:, :1], torch.full((len(ids), 3), 77), ids), dim=1)
    answers = torch.full_like(headed, IGNORE)
    answers[:, 4:] = torch.where(ids == PAD, IGNORE, ids)  # all behind the header is the answer
    for late, expected in ((0, (4, 4, 4)), (1, (0, 4, 4)), (2, (0, 0, 4))):
        masked = answers.clone()
        masked[:, 4 : 4 + late] = IGNORE
        found = host(masked, headed, None, reading(shifted=False, pad_id=None))
        assert found["answer_pairs"] == 4
        names = ("pairs_alike_before", "pairs_alike_two_before", "pairs_alike_three_before")
        assert tuple(found[name] for name in names) == expected, late
    begun_ids = torch.cat((ids[:, :1], ids), dim=1)
    begun = host(torch.cat((labels[:, :1], labels), dim=1), begun_ids, None, reading(shifted=False, pad_id=None))
    assert begun["rows_begun_twice"] == int((ids[:, 0] != ids[:, 1]).sum()) >= 4
    assert begun["rows"] == len(ids)
    bare = host(labels, None, None, reading(shifted=False))
    assert (bare["compared"], bare["rows_begun_twice"]) == (0, -1)


@pytest.mark.parametrize("shifted", [False, True])
def test_answers_behind_the_ends_of_prompts(shifted: bool) -> None:
    """Three samples in the template ``question 7 8 answer 8``, whose answers are masked more or less."""
    ids = torch.tensor([[20, 21, 7, 8, 30, 31, EOS, 7], [22, 7, 7, 8, 32, 8, EOS, PAD], [8, 7, 8, 8, 33, EOS, PAD, 7]])

    def counted(labels: torch.Tensor, end: tuple[int, ...]) -> tuple[int, int, int]:
        found = host(shift(labels) if shifted else labels, ids, None, reading(shifted=shifted, prompt_end=end))
        return found["answers_beside_prompts"], found["prompt_ends"], found["prompt_ends_labelled"]

    answers = ids.masked_fill(torch.arange(8) < 4, IGNORE).masked_fill(ids == PAD, IGNORE)
    answers[:, 7] = IGNORE
    assert counted(answers, (7, 8)) == (3, 3, 2)
    assert counted(answers, (8,)) == (3, 6, 4)
    assert counted(answers, (9, 8)) == (3, 0, 0)
    late = answers.clone()
    late[:, 4] = IGNORE
    assert counted(late, (7, 8)) == (3, 3, 0)
    assert counted(answers, ()) == (-1, -1, -1)


@pytest.mark.parametrize(
    ("prompts", "end"),
    [
        (([1, 2, 7, 8], [3, 7, 8]), (7, 8)),
        (([1, 6, 7, 8], [2, 6, 7, 8]), (7, 8)),  # before the template, questions may be alike
        (([1, 8], [2, 8], [3, 8]), (8,)),
        (([8], [2, 8]), (8,)),
        (([1, 2], [1, 3]), ()),
        (([1, 7, 8], [1, 7, 8]), ()),  # one and the same question
        (([1, 7, 8],), ()),
        ((), ()),
    ],
)
def test_what_prompts_have_in_common_at_their_end(prompts: tuple[list[int], ...], end: tuple[int, ...]) -> None:
    assert common_end(prompts) == end


def test_padding_that_is_not_known_once_is_not_known() -> None:
    ids, labels, mask = batch(5)
    known = count_on_host(reading(shifted=False), labels.numpy(), ids.numpy(), mask.numpy())
    unknown = count_on_host(reading(shifted=False, pad_id=None), labels.numpy(), ids.numpy(), None)
    total = dict(zip(SIGNAL_COUNTS, add_counts(np.stack([known, unknown])).tolist(), strict=True))
    assert total["padding"] == -1
    assert total["rows"] == 2 * len(ids)
    assert total["positions"] == 2 * ids.numel()
    assert total["batches"] == 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_hashes_tell_samples_apart_alike_on_host_and_device(dtype: torch.dtype) -> None:
    ids, labels, _ = batch(6)
    ids, labels = ids.to(dtype), labels.to(dtype)
    ids[2], labels[2] = ids[1], labels[1]
    hashes = hash_on_host(labels.numpy(), ids.numpy())
    assert hashes.tolist() == DeviceHash()(labels, ids).tolist()
    assert hashes[1] == hashes[2]
    assert len(set(hashes.tolist())) == 4
    other = labels.clone()
    other[0, 5] += 1
    assert hash_on_host(other.numpy(), ids.numpy())[0] != hashes[0]
    assert hash_on_host(labels.numpy(), None).tolist() == DeviceHash()(labels, None).tolist()
