"""A ``Trainer`` that keeps what goes through it, the callback on in-process transports, and how the two compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tests.integration.transformers import smolvlm_trainer as tiny
from tests.support import reference

import sidestep
from sidestep.protocol.messages import Gradients, Losses
from sidestep.trainer_hooks.transport import InProcessTransport

EVERY_STEP = sidestep.HooksConfig(
    token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1, gradient_log_interval=1, answer_length_interval=1
)
VOCABULARY = reference.Vocabulary(size=len(tiny.WORDS), eos=tiny.EOS, image=tiny.IMAGE)


class Ways:
    """Opens in-process transports and remembers them."""

    def __init__(self) -> None:
        self.opened: list[InProcessTransport] = []

    def __call__(self, *arguments: Any) -> InProcessTransport:
        self.opened.append(InProcessTransport(*arguments))
        return self.opened[-1]

    def of(self, kind: type[Any], number: int = -1) -> list[Any]:
        return [message for message in self.opened[number].messages if isinstance(message, kind)]


class Recording(transformers.Trainer):  # type: ignore[misc]  # its types are not read
    """Keeps what goes through: ids, labels, logits, loss per micro-batch; norms before clipping per step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[reference.RawBatch] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        kept = {name: value.numpy().copy() for name, value in inputs.items() if value.dim() == 2}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self.losses.append(float(loss.detach()))
            self.batches.append(
                reference.RawBatch(
                    input_ids=kept["input_ids"], labels=kept["labels"], mask=kept["attention_mask"],
                    logits=outputs.logits.detach().double().numpy().copy(), loss=self.losses[-1], shifted=False,
                )
            )  # fmt: skip
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.norms.append(float(norm))
        return norm


def made(
    folder: Path, callback: sidestep.TrainerCallback | None, *, rows: Any = None, kind: Any = Recording, **more: Any
) -> Any:
    parts = {"train_dataset": tiny.rows(16) if rows is None else rows, "eval_dataset": tiny.rows(2, seed=3)}
    return kind(
        model=tiny.model(),
        args=tiny.arguments(folder, **({"max_steps": 3, "logging_steps": 1} | more)),
        data_collator=tiny.collate,
        processing_class=tiny.tokenizer(),
        callbacks=[callback] if callback is not None else [],
        **parts,
    )


def callback_to(ways: Ways, **more: Any) -> sidestep.TrainerCallback:
    given: dict[str, Any] = {"config": EVERY_STEP, "transport": ways, "modules": tiny.MODULES}
    return sidestep.TrainerCallback(**(given | more))


def assert_losses_equal(sent: list[Losses], batches: list[reference.RawBatch]) -> None:
    assert len(sent) == len(batches)
    for message, batch in zip(sent, batches, strict=True):
        answers = reference.answers_of(batch, VOCABULARY.eos)
        expected = [loss for answer in answers for loss in answer.losses]
        assert not message.sampled
        np.testing.assert_allclose(message.losses, expected, rtol=1e-5, atol=1e-6)
        assert message.target_ids.tolist() == [target for answer in answers for target in answer.targets]


def total_norm(message: Gradients) -> float:
    scale = 4.0 ** message.exponents.astype(np.float64)
    return math.sqrt(float((scale * (message.m2 + message.counts * message.means**2)).sum()))
