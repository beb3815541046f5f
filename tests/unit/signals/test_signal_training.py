"""Signals of a whole training over the in-process transport, against float64; and what the images are worth."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sidestep
from sidestep.protocol.messages import SIGNAL_COUNTS, Kind, Probe, Signals, StepEnd
from sidestep.trainer_hooks.capture import Batch
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.reductions.alignment import align
from sidestep.trainer_hooks.signals.images import image_numbers
from sidestep.trainer_hooks.signals.microbatch import MicroSignalReader, MicroSignals, micro_arrays
from sidestep.trainer_hooks.signals.step import StepFacts, StepSignals, signals_message
from sidestep.trainer_hooks.transport import InProcessTransport

VOCABULARY, EOS, IGNORE = 23, 1, -100


class TinyVlm(nn.Module):
    """Images through a projector in front of every position; labels already shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.modality_projector = nn.Linear(16, 12)
        self.head = nn.Linear(12, VOCABULARY)

    def forward(
        self, input_ids: torch.Tensor, images: Any, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen = self.modality_projector(torch.as_tensor(images).flatten(1).unsqueeze(1))
        logits = self.head(self.embedding(input_ids) + seen)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        return logits, loss


def batches(seed: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        images = torch.rand(6, 1, 4, 4, generator=draw)
        ids = torch.randint(2, VOCABULARY, (6, 10), generator=draw)
        targets = ids.roll(-1, dims=1)
        targets[:, :5] = IGNORE
        targets[:, 7] = EOS
        targets[:, 8:] = IGNORE
        targets[:, 5] = 2 + (images.flatten(1).sum(dim=1) * 2.6).long().clamp(max=VOCABULARY - 3)
        yield ids, images, targets


class Trained:
    """A training of some steps, and everything that its hooks sent."""

    def __init__(self, *, steps: int, accumulation: int = 1, learning_rate: float = 0.05, **config: Any) -> None:
        torch.manual_seed(0)
        self.model = TinyVlm()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate)
        self.transports: list[InProcessTransport] = []
        self.logits: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.norms: list[float] = []
        self.weight_norms: list[float] = []

        def opened(*arguments: Any) -> InProcessTransport:
            self.transports.append(InProcessTransport(*arguments))
            return self.transports[-1]

        hooks = sidestep.attach(
            self.model,
            self.optimizer,
            config=HooksConfig(eos_id=EOS, vocabulary_size=VOCABULARY, **config),
            transport=opened,
        )
        data = batches(1, steps * accumulation)
        for step in range(steps):
            seen = []
            for _ in range(accumulation):
                ids, images, targets = next(data)
                logits, loss = self.model(ids, images, targets=targets)
                assert loss is not None
                (loss / accumulation).backward()
                seen.append((logits.detach().double(), targets))
            self.logits.append(seen)
            hooks.before_clip()
            self.norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)))
            self.optimizer.step()
            squares = [parameter.detach().double().square().sum() for parameter in self.model.parameters()]
            self.weight_norms.append(float(torch.stack(squares).sum().sqrt()))
            self.optimizer.zero_grad()
            hooks.after_step(step)
            assert self.transports[0].messages  # looked at, as the publisher does: staging has room again
        hooks.close()
        self.failures = hooks.failures()

    def messages(self, kind: Kind) -> list[Any]:
        return [message for message in self.transports[0].messages if message.kind == kind]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_step_has_its_signals_and_they_equal_float64(accumulation: int) -> None:
    trained = Trained(steps=6, accumulation=accumulation)
    assert trained.failures == {}
    signals: list[Signals] = trained.messages(Kind.SIGNALS)
    assert [each.step for each in signals] == list(range(6))
    assert all(end.sent["signals"] == 1 for end in trained.messages(Kind.STEP_END))
    for each, seen in zip(signals, trained.logits, strict=True):
        logits = torch.cat([logits.flatten(0, 1) for logits, _ in seen])
        targets = torch.cat([targets.flatten() for _, targets in seen])
        rows = targets != IGNORE
        logp = logits[rows].log_softmax(dim=1)
        p = logp.exp()
        counts = dict(zip(SIGNAL_COUNTS, each.counts.tolist(), strict=True))
        assert each.labelled == counts["labelled"] == int(rows.sum()) == 18 * accumulation
        assert counts["answers"] == counts["answers_with_eos"] == 6 * accumulation
        assert counts["batches"] == accumulation
        assert not each.sampled
        assert each.targets.tolist() == targets[rows].tolist()
        assert each.predictions.tolist() == logits[rows].argmax(dim=1).tolist()
        assert each.places.tolist() == [0, 1, 2] * 6 * accumulation
        assert each.answers.tolist() == [n for n in range(6 * accumulation) for _ in range(3)]
        losses = -logp.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
        np.testing.assert_allclose(each.losses, losses.numpy(), rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(each.entropies, -(p * logp).sum(dim=1).numpy(), rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(each.eos_probabilities, p[:, EOS].numpy(), rtol=2e-3, atol=1e-4)
        assert each.top_probability == pytest.approx(float(p.max(dim=1).values.mean()), rel=1e-4)
        mean = p.mean(dim=0)
        assert each.vocabulary == VOCABULARY
        assert sorted(each.mean_ids.tolist()) == list(range(VOCABULARY))
        np.testing.assert_allclose(
            each.mean_probabilities, mean[torch.from_numpy(each.mean_ids).long()].numpy(), rtol=1e-4
        )
        assert len(each.image_hashes) == len(set(each.image_hashes.tolist())) == 6 * accumulation
        assert len(each.image_means) == len(each.image_deviations) == 6 * accumulation
        assert len(set(each.sample_hashes.tolist())) == 6 * accumulation
        assert each.projector_rms > 0
        assert each.projector_spread > 0
        assert each.trainer_losses.size == accumulation
        assert each.rates.tolist() == [0.05]
    assert float(signals[0].gradient_norm[0]) == pytest.approx(trained.norms[0], rel=1e-5)
    assert signals[0].module_norms.size == 3
    assert all(not each.gradient_norm.size for each in signals[1:])
    assert float(np.linalg.norm(signals[0].weight_norms)) == pytest.approx(trained.weight_norms[0], rel=1e-5)
    assert all(not each.weight_norms.size for each in signals[1:])
    assert [each.optimizer_steps.tolist() for each in signals] == [[float(step + 1)] for step in range(6)]
    beats = [each.heartbeat for each in signals]
    assert all((a != b).any() for a, b in pairwise(beats))
    assert len({each.heartbeat_digest for each in signals}) == 1
    assert signals[0].step_seconds == -1.0
    assert all(each.step_seconds > each.signal_seconds > 0 for each in signals[1:])


def test_rows_over_the_limit_are_a_sample_of_whole_answers() -> None:
    trained = Trained(steps=4, accumulation=3, signal_rows_per_step=18)
    for each in trained.messages(Kind.SIGNALS):
        assert each.sampled
        assert 0 < each.targets.size <= 18
        assert each.places.tolist() == [0, 1, 2] * (each.targets.size // 3)
        assert each.labelled == 54


def test_no_rows_wanted_no_signals() -> None:
    trained = Trained(steps=2, signal_rows_per_step=0)
    assert trained.messages(Kind.SIGNALS) == trained.messages(Kind.PROBE) == []


def test_a_rate_of_zero_leaves_the_heartbeat_as_it_is() -> None:
    trained = Trained(steps=4, learning_rate=0.0)
    beats = [each.heartbeat for each in trained.messages(Kind.SIGNALS)]
    assert all((a == b).all() for a, b in pairwise(beats))


def test_images_are_worth_something_to_a_model_that_has_learnt_to_look() -> None:
    trained = Trained(steps=401, image_probe_interval=100, wiring_probe_interval=0)
    assert trained.failures == {}
    probes: list[Probe] = trained.messages(Kind.PROBE)
    assert [probe.step for probe in probes] == [100, 200, 300, 400]
    last = probes[-1]
    assert (last.images, last.labelled) == (6, 18)
    assert last.rolled_loss - last.loss > 0.05
    logits, targets = trained.logits[400][0]
    end: StepEnd = trained.messages(Kind.STEP_END)[400]
    assert end.sent["probe"] == 1
    assert last.loss < float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))


def test_hooks_and_probe_change_no_bit() -> None:
    torch.manual_seed(0)
    plain = TinyVlm()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05)
    for ids, images, targets in batches(1, 30):
        _, loss = plain(ids, images, targets=targets)
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    watched = Trained(steps=30, image_probe_interval=5, wiring_probe_interval=5).model
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("max_rows", [5, 1000])
def test_labels_on_a_device_are_read_like_labels_on_the_host(shifted: bool, max_rows: int) -> None:
    ids, images, targets = next(batches(3, 1))
    labels = targets if shifted else targets.roll(1, dims=1)
    torch.manual_seed(0)
    logits, loss = TinyVlm()(ids, images, targets=targets)
    reader = MicroSignalReader(eos_id=EOS, pad_id=None, ignore_index=IGNORE)
    batch = Batch(input_ids=ids, labels=labels, logits=logits, loss=loss)
    aligned = align(input_ids=ids, labels=labels, shifted=shifted, eos_id=EOS)
    made = [
        reader.read(batch, each, shifted=shifted, max_rows=max_rows, seed=7, images=images) for each in (None, aligned)
    ]
    staged = [{name: tensor.detach().numpy() for name, tensor in each.tensors.items()} for each in made]
    on_host, on_device = (micro_arrays(each.host, arrays) for each, arrays in zip(made, staged, strict=True))
    for name in ("counts", "hashes", "labelled"):
        np.testing.assert_array_equal(getattr(on_host, name), getattr(on_device, name))
    if max_rows == 1000:
        for name in ("targets", "places", "answers", "predictions"):
            np.testing.assert_array_equal(getattr(on_host, name), getattr(on_device, name))
        for name in ("losses", "entropies", "eos", "top"):
            np.testing.assert_allclose(getattr(on_host, name), getattr(on_device, name), rtol=1e-5, atol=1e-6)
        assert on_host.mean_sum is not None
        assert made[1].mean_sum is not None
        np.testing.assert_allclose(on_host.mean_sum, made[1].mean_sum.detach().numpy(), rtol=1e-5)
    else:
        assert on_host.targets.size == 3
        assert on_device.targets.size == 5
        assert on_device.places.tolist()[:3] in ([0, 1, 2], [0, 1, 0])


def test_samples_of_an_encoder_decoder_are_told_apart_by_what_its_encoder_reads() -> None:
    labels, asked = torch.full((4, 3), 7), torch.arange(4 * 9).view(4, 9)
    reader = MicroSignalReader(eos_id=EOS, pad_id=None, ignore_index=IGNORE)
    batch = Batch(labels=labels, encoder_ids=asked)
    on_host = reader.read(batch, None, shifted=True, max_rows=9, seed=7)
    asked_then = asked.clone()
    asked.zero_()
    hashes = micro_arrays(on_host.host, {}).hashes
    assert len(set(hashes.tolist())) == 4
    batch = Batch(labels=labels, encoder_ids=asked_then)
    on_device = reader.read(batch, align(input_ids=None, labels=labels, shifted=True), shifted=True, max_rows=9, seed=7)
    np.testing.assert_array_equal(on_device.tensors["hashes"].numpy(), hashes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_images_of_any_dtype_are_read_on_the_host(dtype: torch.dtype) -> None:
    ids, _, targets = next(batches(3, 1))
    images = (torch.rand(3, 3, 4, 4) * 200).to(dtype)
    reader = MicroSignalReader(eos_id=EOS, pad_id=None, ignore_index=IGNORE)
    batch = Batch(input_ids=ids, labels=targets)
    made = reader.read(batch, None, shifted=True, max_rows=100, seed=7, images=images)
    numbers, wanted = micro_arrays(made.host, {}).image_numbers, image_numbers(images)
    assert numbers is not None
    assert wanted is not None
    np.testing.assert_allclose(numbers, wanted.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["tensor", "list", "one image"])
def test_a_trainer_may_change_its_images_once_they_were_read(form: str) -> None:
    ids, images, targets = next(batches(3, 1))
    count = 1 if form == "one image" else 6
    given = images if form == "tensor" else list(images)[:count]
    reader = MicroSignalReader(eos_id=EOS, pad_id=None, ignore_index=IGNORE)
    batch = Batch(input_ids=ids, labels=targets)
    wanted = image_numbers(given)
    made = reader.read(batch, None, shifted=True, max_rows=100, seed=7, images=given)
    images.zero_()
    numbers = micro_arrays(made.host, {}).image_numbers
    assert wanted is not None
    assert numbers is not None
    assert numbers.shape == (count, 4)
    np.testing.assert_allclose(numbers, wanted.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_copied", [False, True])
def test_a_trainer_may_change_its_batch_once_it_was_read(dtype: torch.dtype, is_copied: bool) -> None:
    ids, _, targets = next(batches(3, 1))
    mask, logits = torch.ones(targets.shape, dtype=dtype), torch.randn(*targets.shape, VOCABULARY).to(dtype)
    loss = torch.tensor(2.5, requires_grad=True)
    reader = MicroSignalReader(eos_id=EOS, pad_id=None, ignore_index=IGNORE)
    batch = Batch(input_ids=ids, labels=targets, attention_mask=mask, logits=logits, loss=loss)

    def read() -> MicroSignals:
        labels = targets.numpy().copy() if is_copied else None
        return reader.read(batch, None, shifted=True, max_rows=100, seed=7, copied=labels)

    before, made = micro_arrays(read().host, {}), read()
    for each in (ids, targets, mask, logits, loss.detach()):
        each.zero_()
    after = micro_arrays(made.host, {})
    assert after.trainer_loss == before.trainer_loss == 2.5
    assert before.labelled == 18
    for name in ("counts", "hashes", "targets", "losses", "entropies", "predictions"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_only_the_trainers_own_losses() -> None:
    ids, _, targets = next(batches(3, 1))
    losses = torch.rand(targets.shape)
    reader = MicroSignalReader(eos_id=EOS, pad_id=None, ignore_index=IGNORE)
    made = reader.read(
        Batch(input_ids=ids, labels=targets, token_losses=losses), None, shifted=True, max_rows=100, seed=0
    )
    arrays = {name: tensor.numpy() for name, tensor in made.tensors.items()}
    facts = StepFacts(step=3, max_rows=100, has_eos=True)
    message = signals_message(facts, [made.host], 0, {f"0/{name}": array for name, array in arrays.items()})
    np.testing.assert_allclose(message.losses, losses[targets != IGNORE].numpy(), rtol=1e-3)
    assert message.predictions.size == message.entropies.size == message.mean_ids.size == 0
    assert message.top_probability == -1.0


def test_a_batch_without_labels_has_counts_and_no_rows() -> None:
    ids, _, targets = next(batches(3, 1))
    reader = MicroSignalReader(eos_id=EOS, pad_id=None, ignore_index=IGNORE)
    empty = torch.full_like(targets, IGNORE)
    logits = torch.zeros(*ids.shape, VOCABULARY)
    for aligned in (None, align(input_ids=ids, labels=empty, shifted=True, eos_id=EOS)):
        made = reader.read(
            Batch(input_ids=ids, labels=empty, logits=logits), aligned, shifted=True, max_rows=100, seed=0
        )
        step = StepSignals(microbatches=[made])
        arrays = {name: tensor.numpy() for name, tensor in step.tensors().items()}
        message = signals_message(StepFacts(step=3, max_rows=100, has_eos=True), step.host_copies(), 0, arrays)
        assert message.counts[SIGNAL_COUNTS.index("batches_without_labels")] == 1
        assert message.targets.size == message.losses.size == message.mean_ids.size == message.labelled == 0


def test_a_step_without_labels_knows_no_counts() -> None:
    step = StepSignals()
    message = signals_message(StepFacts(step=3, max_rows=100, has_eos=True), step.host_copies(), 0, {})
    assert set(message.counts.tolist()) == {-1}
