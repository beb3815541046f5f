"""Trains the demo's model for a few steps with hooks attached, and records every raw tensor beside them.

    python tests/support/recording_trainer.py --record FILE.npz [--accumulation N] [--unshifted] [--steps N]

What is recorded is what a reader of docs/metrics.md needs to compute every metric again (tests/support/reference.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import sidestep
from sidestep.examples.digits_vqa.model import VisionLanguageModel
from sidestep.examples.digits_vqa.packing import Batch
from sidestep.examples.digits_vqa.prompts import mixed_prompts
from sidestep.examples.digits_vqa.settings import Settings
from sidestep.examples.digits_vqa.training import Training, attach_hooks, build, train

BATCH_INTERVAL = 2
GRADIENT_INTERVAL = GENERATION_INTERVAL = 3


class Recorder:
    """An observer of the demo's training that keeps what it sees."""

    def __init__(self, training: Training) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        self._training = training
        self._microstep: dict[int, int] = {}
        self._prompts = mixed_prompts(training.held_out, training.tokenizer, training.settings.num_generation_samples)

    def after_forward(self, step: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> None:
        microstep = self._microstep.get(step, 0)
        self._microstep[step] = microstep + 1
        place = f"batch/{step}/{microstep}"
        self.arrays[f"{place}/labels"] = batch["labels"].numpy().copy()
        if step % BATCH_INTERVAL == 0:
            self.arrays[f"{place}/input_ids"] = batch["input_ids"].numpy().copy()
            self.arrays[f"{place}/mask"] = batch["attention_mask"].numpy().copy()
            self.arrays[f"{place}/logits"] = logits.detach().numpy().copy()
            self.arrays[f"{place}/loss"] = loss.detach().numpy().copy()

    def before_clip(self, step: int, model: VisionLanguageModel) -> None:
        if step % GRADIENT_INTERVAL == 0:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    self.arrays[f"gradient/{step}/{name}"] = parameter.grad.numpy().copy()

    def after_step(self, step: int, model: VisionLanguageModel, learning_rates: list[float]) -> None:
        self.arrays[f"lr/{step}"] = np.array(learning_rates)
        if step % GENERATION_INTERVAL == 0:
            for number, prompt in enumerate(self._prompts):
                self.arrays[f"generated/{step}/{number}"] = self._generate(model, prompt.ids, prompt.tiles)

    def _generate(self, model: VisionLanguageModel, ids: list[int], tiles: list[torch.Tensor]) -> NDArray[Any]:
        """The model's own greedy ``generate``, one prompt alone: no batch, no padding, nothing of the hooks'."""
        model.eval()
        made = model.generate(
            torch.tensor([ids]),
            [tiles],
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=self._training.settings.max_new_tokens,
            greedy=True,
        )
        model.train()
        return made[0].numpy().copy()


def unshift(labels: torch.Tensor) -> torch.Tensor:
    """Undo the dataset's roll: ``labels[t]`` is then the target of ``logits[t - 1]``, as Hugging Face has it."""
    moved = torch.full_like(labels, -100)
    moved[:, 1:] = labels[:, :-1]
    return moved


class UnshiftedHooks:
    """Passes the demo's calls on with labels as Hugging Face has them."""

    def __init__(self, hooks: sidestep.Hooks) -> None:
        self._hooks = hooks

    def on_batch(self, *, labels: torch.Tensor, shifted: bool, **rest: Any) -> None:
        assert shifted
        self._hooks.on_batch(labels=unshift(labels), shifted=False, **rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--unshifted", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        num_steps=options.steps,
        accumulation_steps=options.accumulation,
        batch_size=2,
        batch_interval_steps=BATCH_INTERVAL,
        gradient_interval_steps=GRADIENT_INTERVAL,
        generation_interval_steps=GENERATION_INTERVAL,
        collapse_interval_steps=GENERATION_INTERVAL,
        answer_interval_steps=BATCH_INTERVAL,
        num_generation_samples=8,
        max_new_tokens=12,
    )
    training = build(settings)
    hooks: Any = attach_hooks(training)
    recorder = Recorder(training)
    train(training, UnshiftedHooks(hooks) if options.unshifted else hooks, recorder)  # type: ignore[arg-type]
    hooks.log({"val_loss": 1.25, "note": "own"}, step=options.steps - 1)
    hooks.close()
    tokenizer = training.tokenizer
    facts = np.array([len(tokenizer), tokenizer.eos_token_id, tokenizer.image_token_id])
    save: Any = np.savez  # its stub takes a map of arrays for one of flags
    save(options.record, vocabulary=facts, **recorder.arrays)


if __name__ == "__main__":
    main()
