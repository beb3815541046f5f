"""The same metrics taken inline: on the training thread, read from the device at once, logged with ``wandb.log``.

This is how such metrics are usually written (docs/metrics.md lists them): one ``.item()`` per value, the loss over
every position, one blocking generation per sample. It stands beside Sidestep in ``step_overhead.py``, nowhere else.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

import torch
import wandb
from torch.nn import functional as F

from sidestep.examples.digits_vqa.prompts import mixed_prompts
from sidestep.examples.digits_vqa.training import Training
from sidestep.trainer_hooks.config import HooksConfig

IGNORE_INDEX = -100


class InlineLogger:
    """Has the hooks' calls, does all of their work on the spot."""

    def __init__(self, training: Training, config: HooksConfig, *, generate: bool) -> None:
        self._training, self._config, self._generate = training, config, generate
        self._step, self._epoch_lengths = 0, list[int]()
        self._values: dict[str, Any] = {}
        self._prompts = mixed_prompts(training.held_out, training.tokenizer, config.generation_samples)
        self._folder = tempfile.TemporaryDirectory(prefix="inline-logger-")
        self._run = wandb.init(
            mode="offline", dir=self._folder.name, settings=wandb.Settings(silent=True, console="off")
        )

    def on_batch(
        self,
        *,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor,
        logits: torch.Tensor,
        loss: torch.Tensor,
        **_: Any,
    ) -> None:
        """Measure a micro-batch."""
        lengths = self._answer_lengths(labels)
        self._epoch_lengths += lengths
        if self._due(self._config.token_stats_interval):
            self._tokens(input_ids, labels, attention_mask, lengths)
        if self._due(self._config.loss_breakdown_interval):
            self._losses(logits, labels)
            self._values["loss/trainer"] = loss.item()

    def before_clip(self) -> None:
        """Measure gradients and rates."""
        if self._due(self._config.gradient_log_interval):
            self._gradients()
        if self._due(self._config.lr_interval):
            for number, group in enumerate(self._training.optimizer.param_groups):
                self._values[f"lr/{number}"] = group["lr"]

    def after_step(self, step: int) -> None:
        """Measure answer lengths, generate, log."""
        if self._due(self._config.answer_length_interval):
            lengths = torch.tensor(self._epoch_lengths, dtype=torch.float32)
            self._values["data/answer_length_mean"] = lengths.mean().item()
            self._values["data/answer_length_std"] = lengths.std().item()
            self._values["data/answer_length_histogram"] = wandb.Histogram(self._epoch_lengths)
        wanted = self._due(self._config.generation_eval_interval) or self._due(self._config.collapse_detection_interval)
        if self._generate and wanted:
            self._generations()
        if self._values:
            self._run.log({"train/step": step, **self._values})
            self._values = {}
        self._step = step + 1

    def close(self) -> None:
        """End the run."""
        self._run.finish()
        self._folder.cleanup()

    def _due(self, interval: int) -> bool:
        return interval > 0 and self._step % interval == 0

    def _answer_lengths(self, labels: torch.Tensor) -> list[int]:
        lengths, eos = [], self._training.tokenizer.eos_token_id
        for row in labels.tolist():
            content, ended, inside = 0, False, False
            for target in [*row, IGNORE_INDEX]:
                if target == IGNORE_INDEX:
                    if inside:
                        lengths.append(content)
                    content, ended, inside = 0, False, False
                else:
                    inside, ended = True, ended or target == eos
                    content += not ended
        return lengths

    def _tokens(self, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, lengths: list[int]) -> None:
        real, targets = ids[mask != 0], labels[labels != IGNORE_INDEX]
        common = torch.bincount(targets).max().item()
        self._values |= {
            "tokens/total_tokens": ids.numel(),
            "tokens/unique_tokens": torch.unique(real).numel(),
            "tokens/unique_token_ratio": torch.unique(real).numel() / len(self._training.tokenizer),
            "tokens/eos_count": (real == self._training.tokenizer.eos_token_id).sum().item(),
            "tokens/pad_ratio": (mask == 0).float().mean().item(),
            "tokens/answer_length": sum(lengths) / max(len(lengths), 1),
            "tokens/answer_diversity_ratio": common / max(targets.numel(), 1),
        }

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        flat, targets = logits.float().view(-1, logits.shape[-1]), labels.reshape(-1)
        losses = F.cross_entropy(flat, targets, ignore_index=IGNORE_INDEX, reduction="none")
        losses = losses[targets != IGNORE_INDEX]
        labelled = labels != IGNORE_INDEX
        starts = labelled & ~F.pad(labelled, (1, 0))[:, :-1]
        first = starts[labelled]
        high = losses > losses.mean() + 2 * losses.std()
        self._values |= {
            "loss/total": losses.mean().item(),
            "loss/first_token": losses[first].mean().item(),
            "loss/later_tokens": losses[~first].mean().item(),
            "loss/std": losses.std().item(),
            "loss/max": losses.max().item(),
            "loss/min": losses.min().item(),
            "loss/high_loss_token_ratio": high.float().mean().item(),
        }

    def _gradients(self) -> None:
        norms = []
        for name, parameter in self._training.model.named_parameters():
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            norm = gradient.norm().item()
            norms.append(norm)
            self._values |= {
                f"gradients/{name}/norm": norm,
                f"gradients/{name}/mean": gradient.mean().item(),
                f"gradients/{name}/std": gradient.std().item() if gradient.numel() > 1 else 0.0,
                f"gradients/{name}/max": gradient.abs().max().item(),
            }
        self._values["gradients/global/total_norm"] = sum(norm**2 for norm in norms) ** 0.5
        self._values["gradients/global/avg_norm"] = sum(norms) / max(len(norms), 1)

    def _generations(self) -> None:
        training = self._training
        table = wandb.Table(columns=["question", "generated", "target", "length"])
        tokens: list[int] = []
        training.model.eval()
        for prompt in self._prompts:
            made = training.model.generate(
                torch.tensor([prompt.ids]),
                [prompt.tiles],
                attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
                max_new_tokens=self._config.max_new_tokens,
                greedy=True,
            )
            content = training.tokenizer.until_end(made[0].tolist())
            tokens += content
            table.add_data(prompt.question, training.tokenizer.decode(content), prompt.answer, len(content))
        training.model.train()
        common = Counter(tokens).most_common(1)
        self._values |= {
            "generation/samples": table,
            "generation/avg_length": len(tokens) / len(self._prompts),
            "collapse/most_common_ratio": common[0][1] / len(tokens) if common else 0.0,
            "collapse/unique_tokens": len(set(tokens)),
        }
