"""The same metrics taken inline: on the training thread, read from the device at once, logged with ``wandb.log``.

This is how such metrics are usually written (docs/metrics.md lists them): one ``.item()`` per value, the loss over
every position, one blocking generation per sample. It stands beside Sidestep in ``step_overhead.py`` and
``nanovlm_step.py``, nowhere else.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import wandb
from torch.nn import functional as F

from sidestep.trainer_hooks.config import HooksConfig

IGNORE_INDEX = -100


class Prompt(Protocol):
    """What to generate from."""

    @property
    def question(self) -> str:
        """What the user says."""

    @property
    def answer(self) -> str:
        """What should come."""

    @property
    def ids(self) -> list[int]:
        """The conversation up to the answer."""

    @property
    def tiles(self) -> list[torch.Tensor]:
        """Its images, as the model takes them."""


class InlineLogger:
    """Has the hooks' calls, does all of their work on the spot."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        config: HooksConfig,
    ) -> None:
        """Open a run of its own, offline.

        Args:
            model: with nanoVLM's contract.
            optimizer: whose rates are logged.
            tokenizer: with ``eos_token_id``, a length and ``decode(ids)``.
            prompts: what to generate from; none: no generation.
            config: whose intervals hold.
        """
        self._model, self._optimizer, self._tokenizer = model, optimizer, tokenizer
        self._config, self._prompts = config, prompts
        self._step, self._epoch_lengths = 0, list[int]()
        self._values: dict[str, Any] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="inline-logger-")
        self.run = wandb.init(
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
            self._losses(logits, labels.to(logits.device))
            self._values["loss/trainer"] = loss.item()

    def before_clip(self) -> None:
        """Measure gradients and rates."""
        if self._due(self._config.gradient_log_interval):
            self._gradients()
        if self._due(self._config.lr_interval):
            for number, group in enumerate(self._optimizer.param_groups):
                self._values[f"lr/{number}"] = group["lr"]

    def after_step(self, step: int) -> None:
        """Measure answer lengths, generate, log."""
        if self._due(self._config.answer_length_interval):
            lengths = torch.tensor(self._epoch_lengths, dtype=torch.float32)
            self._values["data/answer_length_mean"] = lengths.mean().item()
            self._values["data/answer_length_std"] = lengths.std().item()
            self._values["data/answer_length_histogram"] = wandb.Histogram(self._epoch_lengths)
        wanted = self._due(self._config.generation_eval_interval) or self._due(self._config.collapse_detection_interval)
        if self._prompts and wanted:
            self._generations()
        if self._values:
            self.run.log({"train/step": step, **self._values}, step=step)
            self._values = {}
        self._step = step + 1

    def close(self) -> None:
        """End the run."""
        self.run.finish()
        self._folder.cleanup()

    def _due(self, interval: int) -> bool:
        return interval > 0 and self._step % interval == 0

    def _answer_lengths(self, labels: torch.Tensor) -> list[int]:
        lengths, eos = [], self._tokenizer.eos_token_id
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
            "tokens/unique_token_ratio": torch.unique(real).numel() / len(self._tokenizer),
            "tokens/eos_count": (real == self._tokenizer.eos_token_id).sum().item(),
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
        for name, parameter in self._model.named_parameters():
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

    def _content(self, ids: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return ids[: ids.index(eos)] if eos in ids else ids

    def _generations(self) -> None:
        table = wandb.Table(columns=["question", "generated", "target", "length"])
        tokens: list[int] = []
        self._model.eval()
        device = next(self._model.parameters()).device
        for prompt in self._prompts:
            made = self._model.generate(
                torch.tensor([prompt.ids], device=device),
                [prompt.tiles],
                attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64, device=device),
                max_new_tokens=self._config.max_new_tokens,
                greedy=True,
            )
            content = self._content(made[0].tolist())
            tokens += content
            table.add_data(prompt.question, self._tokenizer.decode(content), prompt.answer, len(content))
        self._model.train()
        common = Counter(tokens).most_common(1)
        self._values |= {
            "generation/samples": table,
            "generation/avg_length": len(tokens) / len(self._prompts),
            "collapse/most_common_ratio": common[0][1] / len(tokens) if common else 0.0,
            "collapse/unique_tokens": len(set(tokens)),
        }
