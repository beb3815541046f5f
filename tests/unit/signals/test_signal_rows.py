"""Rows: which are chosen, and what is read of their logits, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidestep.trainer_hooks.reductions import cross_entropy
from sidestep.trainer_hooks.reductions.alignment import align
from sidestep.trainer_hooks.reductions.cross_entropy import logits_source
from sidestep.trainer_hooks.reductions.runs import find_runs_on_host
from sidestep.trainer_hooks.signals import rows as rows_module
from sidestep.trainer_hooks.signals.late_rows import (
    choose_window,
    highest_means,
    labelled_rows,
    reduce_rows,
    whole_answers,
)
from sidestep.trainer_hooks.signals.rows import choose_on_device, choose_on_host, row_signals

EOS = 1


def random_labels(seed: int, rows: int = 6, positions: int = 40) -> torch.Tensor:
    """Answers of 1 to 7 tokens with gaps between them; shifted labels."""
    draw = np.random.default_rng(seed)
    labels = np.full((rows, positions), -100, np.int64)
    for row in labels:
        at = int(draw.integers(0, 5))
        while at < positions:
            size = int(draw.integers(1, 8))
            row[at : at + size] = draw.integers(2, 30, len(row[at : at + size]))
            at += size + int(draw.integers(1, 6))
    return torch.from_numpy(labels)


@pytest.mark.parametrize("max_rows", [0, 1, 3, 20, 64, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_whole_answers_are_chosen_within_the_limit(max_rows: int, seed: int) -> None:
    labels = random_labels(seed)
    runs = find_runs_on_host(labels.numpy(), None, ignore_index=-100, eos_id=EOS)
    choice = choose_on_host(runs, max_rows, seed)
    assert choice.index.size <= max_rows
    assert (np.diff(choice.index) > 0).all()
    assert (labels.flatten()[choice.index] != -100).all()
    sizes = runs.stop - runs.first
    for answer in np.unique(choice.answers):
        chosen = choice.index[choice.answers == answer]
        start = runs.rows[runs.first[answer]]
        assert chosen.tolist() == list(range(start, start + len(chosen)))
        assert choice.places[choice.answers == answer].tolist() == list(range(len(chosen)))
        assert len(chosen) == sizes[answer] or len(np.unique(choice.answers)) == 1
    if max_rows >= runs.rows.size:
        assert choice.index.tolist() == runs.rows.tolist()


def test_other_steps_choose_other_answers() -> None:
    runs = find_runs_on_host(random_labels(0).numpy(), None, ignore_index=-100, eos_id=EOS)
    seen = {tuple(choose_on_host(runs, 20, seed).index.tolist()) for seed in range(20)}
    assert len(seen) > 10
    covered = {index for chosen in seen for index in chosen}
    assert len(covered) > 0.8 * runs.rows.size


@pytest.mark.parametrize("max_rows", [0, 1, 3, 20, 64, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_the_device_chooses_like_the_host(max_rows: int, seed: int) -> None:
    labels = random_labels(seed)
    batch = align(input_ids=None, labels=labels, shifted=True, eos_id=EOS)
    runs = find_runs_on_host(labels.numpy(), None, ignore_index=-100, eos_id=EOS)
    index, origins = choose_on_device(batch, max_rows, seed)
    assert index.shape[0] == min(max_rows, labels.numel())
    assert (index.diff() > 0).all()
    counted = batch.labelled.flatten()[index]
    assert int(counted.sum()) == min(max_rows, runs.rows.size)
    starts = set(runs.rows[runs.first].tolist())
    assert set(origins[counted].tolist()) <= starts
    for origin in set(origins[counted].tolist()):
        chosen = index[counted & (origins == origin)].tolist()
        assert chosen == list(range(origin, origin + len(chosen)))
    cut = [
        origin
        for origin in set(origins[counted].tolist())
        if int((origins[counted] == origin).sum())
        < (runs.stop - runs.first)[(runs.rows[runs.first] == origin).argmax()]
    ]
    assert len(cut) <= 1


def reference(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    wide = logits.to(torch.float64)
    logp = wide.log_softmax(dim=1)
    p = logp.exp()
    losses = -logp.gather(1, targets.unsqueeze(1)).squeeze(1)
    entropies = -(torch.where(p > 0, p * logp, 0.0)).sum(dim=1)
    return losses, entropies, p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [1, 4_000, 64 << 20])
def test_rows_equal_float64(dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", chunk_bytes)
    assert cross_entropy.CHUNK_BYTES == 64 << 20
    torch.manual_seed(0)
    logits = (torch.randn(3, 8, 33) * 6).to(dtype)
    logits[0, 0, :5] = -torch.inf
    kept = logits.clone()
    row, position = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 7, 3, 0, 5])
    targets = torch.tensor([6, 4, EOS, 32, 0])
    read = row_signals(logits_source(logits, 3, 8), row, position, targets, eos_id=EOS, weights=None)
    losses, entropies, p = reference(kept[row, position], targets)
    torch.testing.assert_close(read.numbers[0].double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.numbers[1].double(), entropies, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.numbers[2].double(), p[:, EOS], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(read.numbers[3].double(), p.max(dim=1).values, rtol=1e-5, atol=1e-7)
    assert read.predictions.tolist() == kept[row, position].float().argmax(dim=1).tolist()
    torch.testing.assert_close(read.mean_sum.double(), p.sum(dim=0), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, kept), "the trainer's logits are not touched"


@pytest.mark.parametrize("eos_id", [EOS, None, 99])
def test_rows_are_reduced_alike_later(eos_id: int | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 33) * 6
    logits[0, 0, :5] = -torch.inf
    logits[1, 5] = torch.nan
    row, position = torch.arange(12) // 6, torch.arange(12) % 6
    targets = torch.tensor([6, 4, EOS, 32, 0, 33, -1, 5, 5, 5, 5, 5])
    read = row_signals(logits_source(logits, 2, 6), row, position, targets, eos_id=eos_id, weights=None)
    numbers, predictions, mean_sum = reduce_rows(logits.view(12, 33).numpy().copy(), targets.numpy(), eos_id)
    np.testing.assert_allclose(numbers, read.numbers.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(predictions[:11], read.predictions.numpy()[:11])
    np.testing.assert_allclose(mean_sum, read.mean_sum.numpy(), rtol=1e-5)
    finite = (np.nan_to_num(mean_sum) + np.arange(33)).astype(np.float32)
    ids, sums = highest_means(finite, 5)
    assert ids.tolist() == np.argsort(-finite, kind="stable")[:5].tolist()
    assert sums.tolist() == finite[ids].tolist()


@pytest.mark.parametrize("max_rows", [0, 1, 3, 20, 64, 10_000])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_window_keeps_whole_answers(max_rows: int, shifted: bool) -> None:
    for seed in range(20):
        targets = random_labels(seed)
        labels = targets if shifted else torch.cat((torch.full((6, 1), -100), targets[:, :-1]), dim=1)
        if not shifted:
            targets[:, -1] = -100
        rows = labelled_rows(labels.numpy(), -100, shifted=shifted)
        runs = find_runs_on_host(targets.numpy(), None, ignore_index=-100, eos_id=EOS)
        assert rows.tolist() == runs.rows.tolist()
        window = choose_window(rows, max_rows, seed)
        kept, places, answers = whole_answers(window, runs)
        assert window.index.size == min(max_rows, rows.size)
        sizes = runs.stop - runs.first
        for answer in np.unique(answers[kept]):
            here = places[kept][answers[kept] == answer]
            whole = here.tolist() == list(range(sizes[answer]))
            assert whole or not [n for n in np.unique(answers) if (answers == n).sum() == sizes[n]]


def test_weights_of_zero_do_not_count_in_the_mean() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 9)
    row, position, targets = torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.tensor([1, 2, -100, 4])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    read = row_signals(logits_source(logits, 1, 4), row, position, targets, eos_id=None, weights=weights)
    torch.testing.assert_close(read.mean_sum, logits[0, [0, 1, 3]].softmax(dim=1).sum(dim=0))
    assert torch.isnan(read.numbers[0, 2])
    assert (read.numbers[2] == 0).all()


def test_a_row_of_nan_is_nan_and_the_others_are_not() -> None:
    logits = torch.zeros(1, 2, 5)
    logits[0, 1] = torch.nan
    row, position, targets = torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.tensor([1, 2])
    read = row_signals(logits_source(logits, 1, 2), row, position, targets, eos_id=0, weights=None)
    assert torch.isfinite(read.numbers[:, 0]).all()
    assert torch.isnan(read.numbers[:2, 1]).all()
