"""A language model alone, which the oldest release that the extra allows has too (pyproject.toml, ``transformers``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import torch
import transformers

import sidestep
from sidestep.protocol.messages import Gradients, Losses, Scalars, StepEnd
from sidestep.trainer_hooks.transport import InProcessTransport

NUM_STEPS, VOCABULARY_SIZE, LENGTH = 6, 20, 12
EVERY_STEP = sidestep.HooksConfig(
    token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1, gradient_log_interval=1, answer_length_interval=1
)


@pytest.fixture(autouse=True)
def quiet_library() -> Iterator[None]:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


def rows(num_rows: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(num_rows):
        ids = torch.randint(3, VOCABULARY_SIZE, (LENGTH,), generator=generator)
        labels = torch.cat((torch.full((LENGTH // 2,), -100), ids[LENGTH // 2 :]))
        made.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return made


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def train(folder: Path, callbacks: list[Any], **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=NUM_STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=1, max_grad_norm=0.5, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, eval_strategy="steps", eval_steps=2, seed=7, **more,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=transformers.LlamaForCausalLM(config), args=args, train_dataset=rows(16), eval_dataset=rows(4),
        data_collator=collate, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}], ids=["plain", "smooth", "bf16"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_it_is_seen_whole_and_left_as_it_is(tmp_path: Path, more: dict[str, Any]) -> None:
    opened: list[InProcessTransport] = []

    def way(*arguments: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*arguments))
        return opened[-1]

    alone = train(tmp_path / "a", [], **more).model.state_dict()
    callback = sidestep.TrainerCallback(config=EVERY_STEP, transport=way)
    trainer = train(tmp_path / "b", [callback], **more)
    callback.close()
    assert callback.failures() == {}
    assert [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, alone[name])] == []

    messages, steps = opened[0].messages, range(1, NUM_STEPS + 1)
    assert [m.step for m in messages if isinstance(m, StepEnd)] == list(steps)
    gradients = [m for m in messages if isinstance(m, Gradients)]
    assert {m.clipped for m in gradients} == {False}
    scales = [4.0 ** m.exponents.astype(np.float64) for m in gradients]
    sums = [float((s * (m.m2 + m.counts * m.means**2)).sum()) for s, m in zip(scales, gradients, strict=True)]
    history = trainer.state.log_history
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    np.testing.assert_allclose([math.sqrt(each) for each in sums], norms, rtol=1e-3)
    told = [np.mean([m.trainer_loss[0] for m in messages if isinstance(m, Losses) and m.step == s]) for s in steps]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    np.testing.assert_allclose(told, losses, atol=1e-3)  # older releases round what they log
    assert any("eval/loss" in m.values for m in messages if isinstance(m, Scalars))
