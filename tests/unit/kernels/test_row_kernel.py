"""The rows' kernel against float64 and against torch's operations, in every dtype and at every edge."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sidestep.trainer_hooks.kernels.choice import kernels
from sidestep.trainer_hooks.kernels.row_launch import read_logits
from sidestep.trainer_hooks.reductions.cross_entropy import cross_entropy, kernel_losses, logits_source
from sidestep.trainer_hooks.signals.rows import row_signals

torch.set_num_threads(1)
pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.timeout(180)]

EOS = 1
ROWS, PLACES = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 7, 3, 0, 5])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(width: int, dtype: torch.dtype, batch: int = 3, positions: int = 8) -> Tensor:
    logits = torch.randn((batch, positions, width), generator=torch.Generator().manual_seed(width)) * 6
    logits[0, 0, 1 : 1 + width // 5] = -math.inf  # the first row's target is not among them
    return logits.to(dtype)


def reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp = logits.to(torch.float64).log_softmax(dim=1)
    p = logp.exp()
    known = (targets >= 0) & (targets < logits.shape[1])
    losses = -logp.gather(1, targets.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return torch.where(known, losses, math.nan), -torch.where(p > 0, p * logp, 0.0).sum(dim=1), p


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 64, 150])
def test_listed_rows_equal_float64(dtype: torch.dtype, width: int) -> None:
    logits = drawn(width, dtype)
    kept = logits.clone()
    targets = torch.tensor([width - 1, 0, width // 2, width, -100])
    eos = EOS if width > EOS else None
    read = row_signals(logits_source(logits, 3, 8), ROWS, PLACES, targets, eos_id=eos, weights=None)
    assert not kernels.failures
    losses, entropies, p = reference(kept[ROWS, PLACES], targets)
    torch.testing.assert_close(read.numbers[0].double(), losses, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(read.numbers[1].double(), entropies, rtol=1e-4, atol=1e-5)
    expected_eos = p[:, EOS] if eos is not None else torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(read.numbers[2].double(), expected_eos, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(read.numbers[3].double(), p.max(dim=1).values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(read.mean_sum.double(), p.sum(dim=0), rtol=1e-5, atol=1e-6)
    # Of equal logits the first one, as the argmax of torch on a host.
    assert read.predictions.tolist() == kept[ROWS, PLACES].float().argmax(dim=1).tolist()
    assert torch.equal(logits, kept), "the trainer's logits are not touched"


def test_the_first_of_equal_logits_is_the_prediction() -> None:
    logits = torch.zeros((1, 3, 150))
    logits[0, 1, [140, 70, 17, 66]] = 2.0
    logits[0, 2, [149, 64]] = 2.0
    read = read_logits(logits, torch.zeros(3, dtype=torch.int64), positions=3, with_mean=False)
    assert read.predictions.tolist() == [0, 17, 64]
    assert read.mean_sum is None


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_rows_that_do_not_count_are_not_read(kind: torch.dtype) -> None:
    logits = drawn(40, torch.float32, batch=2, positions=4)
    labelled = torch.tensor([True, False, False, True, False, True, True, False])
    logits.view(8, 40)[~labelled] = math.nan  # what is read of these shows everywhere
    targets = torch.arange(8)
    read = read_logits(logits, targets, positions=4, weights=labelled.to(kind), eos_id=EOS)
    losses, entropies, p = reference(logits.view(8, 40)[labelled], targets[labelled])
    torch.testing.assert_close(read.numbers[0, labelled].double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.numbers[1, labelled].double(), entropies, rtol=1e-4, atol=1e-5)
    assert read.numbers[:, ~labelled].eq(0).all()
    assert read.mean_sum is not None
    torch.testing.assert_close(read.mean_sum.double(), p.sum(dim=0), rtol=1e-5, atol=1e-6)


def test_no_row_at_all_and_no_labelled_one() -> None:
    logits = drawn(33, torch.bfloat16)
    nothing = read_logits(logits, torch.zeros(24, dtype=torch.int64), positions=8, weights=torch.zeros(24))
    assert nothing.mean_sum is not None
    assert nothing.numbers.eq(0).all()
    assert nothing.mean_sum.eq(0).all()
    none = torch.zeros(0, dtype=torch.int64)
    empty = row_signals(logits_source(logits, 3, 8), none, none, none, eos_id=EOS, weights=None)
    assert (empty.numbers.shape, empty.predictions.shape, empty.mean_sum.tolist()) == ((4, 0), (0,), [0.0] * 33)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_numbers_says_so_and_leaves_the_others_alone(value: float) -> None:
    logits = drawn(70, torch.float32, batch=1, positions=2)
    logits[0, 1, 5] = value
    if value == -math.inf:
        logits[0, 1] = value
    targets = torch.tensor([60, 5])
    read = read_logits(logits, targets, positions=2, eos_id=EOS)
    assert read.numbers[:, 1].isnan().all()
    assert 0 <= read.predictions[1] < 70
    losses, entropies, _ = reference(logits[0, :1], targets[:1])
    torch.testing.assert_close(read.numbers[:2, 0].double(), torch.cat((losses, entropies)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["whole", "short", "flat", "cut", "every other"])
def test_losses_of_logits_in_every_shape(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(50, torch.float32)
    logits = {
        "whole": whole,
        "short": whole[:, :7],
        "flat": whole.view(24, 50),
        "cut": whole[:, :, :33],
        "every other": whole[:, :, ::2],  # not as the kernel reads: torch does it
    }[shape]
    targets = torch.tensor([24, 20, 8, 21, 3])
    source = logits_source(logits, 3, 8)
    assert source.suits_kernel == (shape != "every other")
    read = cross_entropy(source, ROWS, PLACES, targets)
    monkeypatch.setenv("SIDESTEP_KERNELS", "torch")
    torch.testing.assert_close(read, cross_entropy(source, ROWS, PLACES, targets), rtol=1e-6, atol=1e-6)
    assert not kernels.failures


def test_all_places_and_the_listed_ones_say_the_same() -> None:
    logits = drawn(45, torch.bfloat16)
    source = logits_source(logits[:, :7], 3, 8)
    labels = torch.arange(24) % 45
    labelled = torch.arange(24) % 3 == 0
    everywhere = kernel_losses(source, labels, positions=8, labelled=labelled)
    assert everywhere is not None
    index = labelled.nonzero().flatten()
    listed = cross_entropy(source, index // 8, index % 8, labels[index])
    assert torch.equal(everywhere[labelled], listed)
    assert everywhere[~labelled].eq(0).all()


def test_the_same_bits_again_in_groups_of_rows() -> None:
    logits = drawn(60, torch.float32, batch=2, positions=11)
    targets = torch.arange(22)
    first, second = (read_logits(logits, targets, positions=11, eos_id=EOS) for _ in range(2))
    assert first.mean_sum is not None
    assert second.mean_sum is not None
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]
    _, _, p = reference(logits.view(22, 60), targets)
    torch.testing.assert_close(first.mean_sum.double(), p.sum(dim=0), rtol=1e-5, atol=1e-6)
