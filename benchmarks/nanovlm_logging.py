"""What happens at the places of nanoVLM's loop where something may be logged, in each of the ways to log."""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmarks.inline_logger import InlineLogger

from sidestep.trainer_hooks.integrations import nanovlm


class NoLogging:
    """The loop's places, with nothing there."""

    def after_forward(self, _batch: Any, _logits: Any, _loss: Any) -> None:
        """Do nothing."""

    def before_clip(self) -> None:
        """Do nothing."""

    def after_microbatch(self, _batch: Any, _loss: Any, _seconds: tuple[float, float, float]) -> None:
        """Do nothing."""

    def after_step(self, _step: int, _norm: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def failures(self) -> dict[str, int]:
        """Nothing can fail."""
        return {}


class OwnLogging(NoLogging):
    """What nanoVLM logs by itself, to a ``run``: W&B's, or the hooks in its place."""

    def __init__(self, run: Any, *, accumulation: int, every_steps: int) -> None:
        self._run, self._accumulation, self._every_steps = run, accumulation, every_steps
        self._batch_loss = 0.0
        self._kept: dict[str, list[float]] = {}

    def after_microbatch(self, batch: Any, loss: Any, seconds: tuple[float, float, float]) -> None:
        """Read the device twice, and keep what its statistics are made of."""
        self._batch_loss = loss.item() * self._accumulation
        num_tokens = torch.sum(batch["attention_mask"]).item()
        data_seconds, compute_seconds, began = seconds
        values = {
            "tokens_per_second": num_tokens / (time.perf_counter() - began),
            "data_load_time": data_seconds,
            "fw_bw_time": compute_seconds,
            "post_process_time": time.perf_counter() - began - compute_seconds,
        }
        for name, value in values.items():
            self._kept.setdefault(name, []).append(value)
        self._kept.setdefault("images_per_sample", []).extend(len(row) for row in batch["images"])

    def after_step(self, step: int, norm: Any) -> None:
        """Log as it does: some means and maxima now and then, loss and norm at every step."""
        if step % self._every_steps == 0:
            means = {f"training_stats/avg_{name}": sum(kept) / len(kept) for name, kept in self._kept.items()}
            most = {f"training_stats/max_{name}": max(kept) for name, kept in self._kept.items()}
            self._run.log({**means, **most}, step=step)
            self._kept = {}
        self._run.log({"batch_loss": self._batch_loss, "grad_norm": norm}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class InlineLogging(OwnLogging):
    """The same, and the inline logger, in one run."""

    def __init__(self, logger: InlineLogger, *, accumulation: int, every_steps: int) -> None:
        super().__init__(logger.run, accumulation=accumulation, every_steps=every_steps)
        self._logger = logger

    def after_forward(self, batch: Any, logits: Any, loss: Any) -> None:
        """Measure the micro-batch."""
        names = ("input_ids", "labels", "attention_mask")
        self._logger.on_batch(**{name: batch[name] for name in names}, logits=logits, loss=loss)

    def before_clip(self) -> None:
        """Measure gradients and rates."""
        self._logger.before_clip()

    def after_step(self, step: int, norm: Any) -> None:
        """Log, generate."""
        super().after_step(step, norm)
        self._logger.after_step(step)

    def close(self) -> None:
        """End the run."""
        self._logger.close()


class SidestepLogging(OwnLogging):
    """The same, through the hooks."""

    def __init__(self, hooks: nanovlm.NanoVLMHooks, *, accumulation: int, every_steps: int) -> None:
        super().__init__(hooks, accumulation=accumulation, every_steps=every_steps)
        self._hooks = hooks

    def failures(self) -> dict[str, int]:
        """What failed inside the hooks."""
        return self._hooks.hooks.failures()

    def after_forward(self, batch: Any, _logits: Any, _loss: Any) -> None:
        """Show the micro-batch."""
        self._hooks.on_batch(batch, 1)

    def before_clip(self) -> None:
        """Show the gradients."""
        self._hooks.before_clip()

    def after_step(self, step: int, norm: Any) -> None:
        """Log, end the step."""
        super().after_step(step, norm)
        self._hooks.after_step(step)
