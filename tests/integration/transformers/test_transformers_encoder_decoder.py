"""The library's ``Trainer`` with encoder-decoders: the decoder's labels and losses, with the encoder's ids beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import torch
import transformers
from tests.integration.transformers.recorded_trainer import Ways
from tests.integration.transformers.toy_batches import BATCH, EOS, IGNORED, PAD, Toy
from tests.integration.transformers.toy_text_models import ENCODER_DECODERS

import sidestep
from sidestep.protocol.messages import Losses, Notice, Signals

NUM_STEPS, ACCUMULATION = 4, 2
CONFIG = sidestep.HooksConfig(loss_breakdown_interval=1, eos_id=EOS, image_probe_interval=0)

Row = dict[str, torch.Tensor]


def rows(toy: Toy) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    batches = [toy.batch(generator) for _ in range(NUM_STEPS)]
    return [{name: values[place] for name, values in each.items()} for each in batches for place in range(BATCH)]


def collated(given: list[Row]) -> Row:
    made = {}
    for name in given[0]:
        values = [row[name] for row in given]
        if values[0].dim() == 1:
            fill = IGNORED if name == "labels" else PAD
            values = list(torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill))
        made[name] = torch.stack(values)
    return made


def trained(toy: Toy, folder: Path, callback: sidestep.TrainerCallback | None, smoothing: float) -> Any:
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH // ACCUMULATION, max_steps=NUM_STEPS,
        gradient_accumulation_steps=ACCUMULATION, learning_rate=3e-3, label_smoothing_factor=smoothing, logging_steps=1,
        report_to="none", save_strategy="no", remove_unused_columns=False, use_cpu=True, disable_tqdm=True, seed=7,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=toy.model(), args=arguments, train_dataset=rows(toy), data_collator=collated,
        callbacks=[callback] if callback is not None else [],
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")
@pytest.mark.parametrize(("place", "smoothing"), [(0, 0.0), (1, 0.0), (2, 0.0), (2, 0.1), (3, 0.0), (4, 0.0)])
def test_an_encoder_decoder_is_seen_by_its_decoder(tmp_path: Path, place: int, smoothing: float) -> None:
    toy, ways = ENCODER_DECODERS[place], Ways()
    alone = trained(toy, tmp_path / "a", None, smoothing)
    callback = sidestep.TrainerCallback(config=CONFIG, transport=ways)
    trainer = trained(toy, tmp_path / "b", callback, smoothing)
    callback.close()
    assert callback.failures() == {}
    assert ways.of(Notice) == []
    weights, others = trainer.model.state_dict(), alone.model.state_dict()
    assert [name for name in others if not torch.equal(weights[name], others[name])] == []

    losses = ways.of(Losses)
    assert len(losses) == NUM_STEPS * ACCUMULATION
    answers = sorted(tuple(row["labels"][row["labels"] != IGNORED].tolist()) for row in rows(toy))
    seen: list[tuple[int, ...]] = []
    for message in losses:
        ends = np.flatnonzero(message.target_ids == EOS) + 1
        seen += [tuple(answer.tolist()) for answer in np.split(message.target_ids, ends[:-1])]
    assert sorted(seen) == answers
    reported = [values["loss"] for values in trainer.state.log_history if "loss" in values]
    told = np.array([message.trainer_loss[0] for message in losses]).reshape(NUM_STEPS, ACCUMULATION)
    np.testing.assert_allclose(told.mean(axis=1), reported, rtol=1e-4)
    signals = ways.of(Signals)
    assert [message.sample_hashes.size for message in signals] == [BATCH] * NUM_STEPS
    hashes = {each for message in signals for each in message.sample_hashes.tolist()}
    if toy.name != "vision_encoder_decoder":  # its encoder reads no ids: answers alone tell samples apart
        assert len(hashes) > len(set(answers))
