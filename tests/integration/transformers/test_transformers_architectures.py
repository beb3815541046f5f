"""Toy models of many architectures: nothing changes, all is seen, the probes are exact, and nothing false is said.

Each is trained for some steps with and without hooks; what they sent is judged as a worker judges it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from benchmarks.detection.judge import judge
from benchmarks.detection.recording import FRAMES_FILE, Recording, read_messages
from tests.integration.transformers.toy_batches import EOS, IGNORED, IMAGE, PAD, VOCABULARY, Toy
from tests.integration.transformers.toy_text_models import ENCODER_DECODERS, LANGUAGE_MODELS
from tests.integration.transformers.toy_vision_models import VISION_MODELS

import sidestep
from sidestep.protocol.messages import Probe, Signals

NUM_STEPS, PROBE_INTERVAL = 24, 20
RATE, WARMUP_STEPS = 3e-3, 10
CONFIG = sidestep.HooksConfig(
    eos_id=EOS, pad_id=PAD, vocabulary_size=VOCABULARY, wiring_probe_interval=PROBE_INTERVAL,
    image_probe_interval=PROBE_INTERVAL,
)  # fmt: skip
TOYS = [*VISION_MODELS, *LANGUAGE_MODELS, *ENCODER_DECODERS]


@dataclass(frozen=True, slots=True)
class Trained:
    losses: torch.Tensor
    weights: torch.Tensor
    batches: list[dict[str, Any]]
    failures: dict[str, int]


def trained(toy: Toy, folder: Path | None) -> Trained:
    """Train for some steps; with hooks where there is a folder for what they send."""
    torch.manual_seed(0)
    model = toy.model()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    recording = Recording(folder / FRAMES_FILE, num_ranks=1) if folder is not None else None
    hooks = None
    if recording is not None:
        hooks = sidestep.attach(model, optimizer, config=CONFIG, transport=recording.open_rank(0))
    generator = torch.Generator().manual_seed(1)
    losses, batches = [], []
    for step in range(1, NUM_STEPS + 1):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, step / WARMUP_STEPS)
        batches.append(toy.batch(generator))
        loss = model(**batches[-1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
        if hooks is not None and recording is not None:
            hooks.after_step(step)
            recording.transports[0].drain()
    failures = {}
    if hooks is not None and recording is not None:
        hooks.close()
        failures = hooks.failures()
        recording.close()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return Trained(torch.stack(losses), weights, batches, failures)


def assert_seen(toy: Toy, signals: list[Signals], made: Trained) -> None:
    """Every labelled position, every image, and the loss that the model itself gives."""
    assert [message.step for message in signals] == list(range(1, NUM_STEPS + 1))
    for message, batch, loss in zip(signals, made.batches, made.losses, strict=True):
        num_labels = int((batch["labels"] != IGNORED).sum())
        assert (message.labelled, message.targets.size, message.predictions.size) == (num_labels,) * 3
        assert message.sample_hashes.size == len(batch["labels"])
        assert message.trainer_losses.tolist() == [pytest.approx(float(loss))]
        if not toy.has_other_loss:
            assert float(message.losses.mean(dtype=float)) == pytest.approx(float(loss), rel=2e-3)
        # Of one image there may be several tiles, and of what fills a batch up one more.
        num_others = len(set(message.image_hashes.tolist()))
        assert (num_others > 0) == (toy.num_images > 0)
        if toy.num_images:
            assert num_others >= len(batch["labels"])
    if toy.num_images and toy.name != "vision_encoder_decoder":
        assert signals[-1].projector_rms > 0


def assert_wired(toy: Toy, probes: list[Probe]) -> None:
    """Exactly 0 where it must be, and not where images reach the answers."""
    assert len(probes) >= 2
    for probe in probes:
        assert (probe.future_change, probe.apart_change, probe.misplaced_change) == (0.0, 0.0, 0.0)
        assert (probe.image_rows > 0, probe.image_change > 0) == (toy.num_images > 0,) * 2
    assert any(probe.future_rows > 0 for probe in probes)
    changes = {probe.padding_change for probe in probes if probe.padding_rows > 0}
    if toy.reads_padding:
        assert changes - {0.0}
    elif toy.name != "llama, packed without padding":
        assert changes == {0.0}


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")
@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_an_architecture_is_seen_whole_and_left_as_it_is(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    alone, made = trained(toy, None), trained(toy, tmp_path)
    assert made.failures == {}
    assert torch.equal(alone.losses, made.losses)
    assert torch.equal(alone.weights, made.weights)

    messages = [recorded.message for recorded in read_messages(tmp_path / FRAMES_FILE)]
    assert_seen(toy, [message for message in messages if isinstance(message, Signals)], made)
    probes = [message for message in messages if isinstance(message, Probe)]
    worth = [probe for probe in probes if probe.labelled]
    assert [probe.step for probe in worth] == ([20] if toy.num_images else [])
    for probe in worth:
        assert probe.images == toy.num_images
        assert probe.rolled_loss != probe.loss
        assert probe.rolled_loss == pytest.approx(probe.loss, rel=1.0)
    wired = [probe for probe in probes if not probe.labelled]
    if toy.is_decoder:
        assert_wired(toy, wired)
    else:
        assert wired == []
    said = [incident.name for incident in judge(tmp_path / FRAMES_FILE).incidents]
    assert said == (["padding_visible"] if toy.reads_padding else [])


def test_the_placeholders_id_is_known_from_the_models_configuration(tmp_path: Path) -> None:
    """Labels at placeholders are told of, though nobody has named their id."""
    toy = VISION_MODELS[0]

    def labelled(generator: torch.Generator) -> dict[str, Any]:
        inputs = toy.batch(generator)
        return {**inputs, "labels": inputs["labels"].where(inputs["input_ids"] != IMAGE, inputs["input_ids"])}

    broken = Toy(name=toy.name, model=toy.model, batch=labelled)
    trained(broken, tmp_path)
    assert "image_tokens_labelled" in [each.name for each in judge(tmp_path / FRAMES_FILE).incidents]
