"""A small training with hooks, in a process of its own: what it trained with, step by step, is in a file beside it.

    python -m tests.support.faults_training OUT [--endpoint ADDRESS] [--steps N] [--until FILE] [--step-seconds S]

Without an endpoint there are no hooks: the control. Each line of OUT is a step that has ended: its number, its loss
exactly, how long the hooks' calls took. The last line says that the training ended, and how. Faults come by
``SIDESTEP_FAULTS``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.nn import functional as F

import sidestep

VOCABULARY, WIDTH, ROWS, LENGTH = 29, 16, 4, 24
IGNORED = -100


class TinyModel(nn.Module):
    """Logits and loss of next ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mixing = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed, _ = self.mixing(self.embedding(input_ids))
        logits = self.head(mixed)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return logits, loss


class Tokenizer:
    """Ids as texts."""

    eos_token_id = 0
    pad_token_id = 0
    all_special_ids = (0,)

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels [ROWS, LENGTH] of a step; the second half of each row is its answer."""
    drawn = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=drawn)
    labels = ids.clone()
    labels[:, : LENGTH // 2] = IGNORED
    labels[:, -1] = ids[:, -1] = 0
    return ids, labels


def attach_hooks(model: nn.Module, optimizer: Any, endpoint: str, close_seconds: float) -> sidestep.Hooks:
    """Attach with something due at every step."""
    config = sidestep.HooksConfig(
        lr_interval=1,
        loss_breakdown_interval=1,
        token_stats_interval=1,
        answer_length_interval=1,
        gradient_log_interval=2,
        close_timeout_seconds=close_seconds,
    )
    return sidestep.attach(
        model, optimizer, tokenizer=Tokenizer(), config=config, project="faults", run_id="faults", endpoint=endpoint
    )


class Timed:
    """How long calls took, altogether, since it was last asked."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def call(self, function: Callable[..., object], *args: object, **named: object) -> None:
        began = time.perf_counter()
        function(*args, **named)
        self._seconds += time.perf_counter() - began

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def train(options: argparse.Namespace, out: TextIO) -> None:
    """Train, and write each step down once it has ended."""
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    hooks = attach_hooks(model, optimizer, options.endpoint, options.close_seconds) if options.endpoint else None
    timed = Timed()
    step = 0
    while step < options.steps and not (options.until and options.until.exists()):
        began = time.perf_counter()
        ids, labels = batch(step)
        logits, loss = model(ids, labels)
        if hooks is not None:
            timed.call(
                hooks.on_batch, input_ids=ids, labels=labels, logits=logits.detach(), loss=loss.detach(), shifted=False
            )
        loss.backward()
        if hooks is not None:
            timed.call(hooks.before_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if hooks is not None:
            timed.call(hooks.after_step, step)
        entry = {"step": step, "loss": loss.item().hex(), "hook_seconds": timed.take()}
        out.write(json.dumps(entry) + "\n")
        out.flush()
        step += 1
        time.sleep(max(0.0, options.step_seconds - (time.perf_counter() - began)))
    failures = hooks.failures() if hooks is not None else {}
    if hooks is not None:
        timed.call(hooks.close)
    out.write(json.dumps({"ended": True, "steps": step, "failures": failures, "close_seconds": timed.take()}) + "\n")


def main() -> int:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="Train a little.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--endpoint", default="")
    parser.add_argument("--steps", type=int, default=1 << 30)
    parser.add_argument("--until", type=Path, default=None)
    parser.add_argument("--step-seconds", type=float, default=0.02)
    parser.add_argument("--close-seconds", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with options.out.open("w", encoding="utf-8") as out:
        train(options, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
