"""TRL's ``SFTTrainer``: its fused head shows losses per token and no logits, and they are the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

import datasets
import torch
import transformers
import trl
from tests.integration.transformers import smolvlm_trainer as tiny
from tests.support import reference

import sidestep
from sidestep.protocol.messages import Gradients, Losses, Scalars, StepEnd, Tokens
from sidestep.trainer_hooks.transport import InProcessTransport

EVERY_STEP = sidestep.HooksConfig(
    token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1, gradient_log_interval=1, answer_length_interval=1,
    generation_eval_interval=6, collapse_detection_interval=6, max_new_tokens=4,
)  # fmt: skip
NUM_STEPS = 12
SAMPLES = [sidestep.Sample(question=f"what is the {word}", target="it is red") for word in ("colour", "picture")]


class Recording(trl.SFTTrainer):  # type: ignore[misc]  # its types are not read
    """Keeps logits of its own second forward, which the fused one does not show."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[reference.RawBatch] = []
        self.norms: list[float] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        kept = {name: inputs[name].clone() for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            logits = model(input_ids=kept["input_ids"], attention_mask=kept["attention_mask"]).logits
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.batches.append(
                reference.RawBatch(
                    input_ids=kept["input_ids"].numpy(), labels=kept["labels"].numpy(),
                    mask=kept["attention_mask"].numpy(), logits=logits.double().numpy(), loss=float(loss.detach()),
                    shifted=False,
                )
            )  # fmt: skip
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.norms.append(float(norm))
        return norm


def made(folder: Path, kind: Any, callbacks: list[Any], **more: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tiny.WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, pad_token_id=tiny.PAD, bos_token_id=tiny.BOS,
            eos_token_id=tiny.EOS,
        )
    )  # fmt: skip
    colours = ["red", "green", "blue", "very red"]
    rows = [
        {"prompt": f"what is the colour of {'the ' * (n % 3)}picture", "completion": f" it is {colours[n % 4]}"}
        for n in range(16)
    ]
    given: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": NUM_STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "logging_steps": 1, "eval_strategy": "steps",
        "eval_steps": 4, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "gradient_checkpointing": False, "bf16": False, "seed": 7,
    }  # fmt: skip
    return kind(
        model=model,
        args=trl.SFTConfig(**(given | more)),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:4]),
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
    )


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")
@pytest.mark.parametrize("smoothed", [False, True])
def test_supervised_finetuning_is_seen_exactly_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoothed: bool
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    more = {"label_smoothing_factor": 0.1} if smoothed else {}
    opened: list[InProcessTransport] = []

    def way(*arguments: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*arguments))
        return opened[-1]

    alone = made(tmp_path / "a", trl.SFTTrainer, [], **more)
    alone.train()
    callback = sidestep.TrainerCallback(config=EVERY_STEP, samples=SAMPLES, transport=way)
    trainer = made(tmp_path / "b", Recording, [callback], **more)
    trainer.train()
    callback.close()
    assert callback.failures() == {}
    weights, others = trainer.model.state_dict(), alone.model.state_dict()
    assert [name for name in others if not torch.equal(weights[name], others[name])] == []

    messages = opened[0].messages
    assert [m.step for m in messages if isinstance(m, StepEnd)] == list(range(1, NUM_STEPS + 1))
    sent = [m for m in messages if isinstance(m, Losses)]
    for message, batch in zip(sent, trainer.batches, strict=True):
        answers = reference.answers_of(batch, tiny.EOS)
        expected = [loss for answer in answers for loss in answer.losses]
        np.testing.assert_allclose(message.losses, expected, rtol=1e-5, atol=2e-6)
        assert message.target_ids.tolist() == [target for answer in answers for target in answer.targets]
        assert not message.sampled
        assert len(expected) > 0
    for tokens, batch in zip([m for m in messages if isinstance(m, Tokens)], trainer.batches, strict=True):
        assert tokens.positions == batch.input_ids.size
        assert tokens.padding == int((batch.mask == 0).sum())
    gradients = [m for m in messages if isinstance(m, Gradients)]
    norms = [
        float(np.sqrt((4.0 ** m.exponents.astype(np.float64) * (m.m2 + m.counts * m.means**2)).sum()))
        for m in gradients
    ]
    np.testing.assert_allclose(norms, trainer.norms, rtol=1e-3)
    logged = [dict(m.values) for m in messages if isinstance(m, Scalars)]
    reported = [values["train/loss"] for values in logged if "train/loss" in values]
    by_step = [float(np.mean([m.trainer_loss[0] for m in sent if m.step == step])) for step in range(1, NUM_STEPS + 1)]
    np.testing.assert_allclose(by_step, reported, rtol=1e-5)
    assert "train/mean_token_accuracy" in logged[0]
    assert sum("eval/loss" in values for values in logged) == 3
    assert [m.kind.name for m in messages].count("GENERATION") == 2
