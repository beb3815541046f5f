"""A case trained for real, with `sidestep.attach` as a user would call it, into a recording and a few facts."""

from __future__ import annotations

import math
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from benchmarks.detection.case import Case, Setup, Twist
from benchmarks.detection.evaluation import Evaluation, evaluate
from benchmarks.detection.lab import Lab, Replica, Suite
from benchmarks.detection.loader import Loader
from benchmarks.detection.prompts import generation_samples
from benchmarks.detection.recording import FRAMES_FILE, Recording
from benchmarks.detection.replicas import average_gradients, make_replicas
from torch import nn

import sidestep
from sidestep.examples.digits_vqa.packing import Batch

GENERATION_INTERVAL_STEPS = 100
"""Longer than the product's default of 50: what is found must not hang on generation."""
_WARMUP_STEPS = 30
_DECAY_SHARE = 0.3
_LAST_STEPS = 20


@dataclass(slots=True, kw_only=True)
class Trained:
    """What a run came to."""

    onset: int
    losses: list[float] = field(default_factory=list)
    """The trainer's loss of each step, mean over ranks."""
    gradient_norms: list[float] = field(default_factory=list)
    """Before clipping, of the first rank."""
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(loss=math.nan, accuracy=0.0, image_gap=0.0))
    """On clean held-out samples, at the end."""
    seconds: float = 0.0
    """Wall time of all steps, hooks and generation included, the drawing of samples and the recording not."""
    hook_failures: dict[str, int] = field(default_factory=dict)

    @property
    def final_loss(self) -> float:
        """Mean of the last losses."""
        return float(np.mean(self.losses[-_LAST_STEPS:]))


def rate_share(step: int, num_steps: int) -> float:
    """Return the share of the peak rate: warm-up, a plateau, a linear end that stops at a tenth."""
    if step < _WARMUP_STEPS:
        return (step + 1) / _WARMUP_STEPS
    left = (num_steps - step) / (num_steps * _DECAY_SHARE)
    return max(0.1, min(1.0, left))


def own_seed(suite: str, setup: Setup, seed: int) -> int:
    """Return what weights and samples are drawn from: the same for a failure and its twin, for nothing else."""
    return zlib.crc32(f"{suite} {setup} {seed}".encode())


def config_of(rank: int, num_ranks: int) -> sidestep.HooksConfig:
    """Return the product's defaults with a longer generation interval.

    Other ranks than the first neither generate nor probe, and all share the rows, as the ranks of a real group do.
    """
    defaults = sidestep.HooksConfig()
    config = replace(
        defaults,
        generation_eval_interval=GENERATION_INTERVAL_STEPS,
        collapse_detection_interval=GENERATION_INTERVAL_STEPS,
        signal_rows_per_step=defaults.signal_rows_per_step // num_ranks,
    )
    if rank == 0:
        return config
    return replace(
        config,
        image_probe_interval=0,
        wiring_probe_interval=0,
        generation_eval_interval=0,
        collapse_detection_interval=0,
        gradient_log_interval=0,
    )


class Run:
    """One training from its first step to its last."""

    def __init__(self, case: Case, suite: Suite, *, seed: int, num_steps: int, folder: Path) -> None:
        """Make models, data and hooks; `folder` is there and gets the recording."""
        setup = case.setup
        drawn_from = own_seed(suite.name, setup, seed)
        torch.manual_seed(drawn_from)
        self.lab = Lab(
            suite=suite,
            setup=setup,
            num_steps=num_steps,
            onset=case.onset(num_steps, seed),
            replicas=make_replicas(suite, setup, drawn_from),
            rng=np.random.default_rng([drawn_from, 3]),
            announce=self._announce,
            mix=dict(setup.mix or suite.mix),
            image_pool=list(range(setup.num_images or suite.num_images)),
        )
        self._usual_mix = dict(self.lab.mix)
        self._twist: Twist = case.twist()
        self._is_twisted = False
        self._loader = Loader(self.lab, drawn_from)
        self._folder = folder
        self._seed = seed
        self._hooks: list[sidestep.Hooks] = []
        self._recording: Recording | None = None
        self.trained = Trained(onset=self.lab.onset)
        if self.lab.onset == 0:
            self._begin()
        self._attach(case)

    def _announce(self, name: str) -> None:
        for hooks in self._hooks:
            hooks.mark_stage(name)

    def _begin(self) -> None:
        self._is_twisted = True
        self._twist.begin(self.lab)

    def _attach(self, case: Case) -> None:
        num_ranks = self.lab.setup.num_ranks
        asked_like = self._twist if self._is_twisted and not case.is_failure else None
        recording = self._recording = Recording(self._folder / FRAMES_FILE, num_ranks=num_ranks)
        for replica in self.lab.replicas:
            self._hooks.append(
                sidestep.attach(
                    replica.model,
                    replica.optimizer,
                    tokenizer=self.lab.suite.tokenizer,
                    samples=generation_samples(self.lab, self._usual_mix, asked_like) if replica.rank == 0 else None,
                    config=config_of(replica.rank, num_ranks),
                    name=case.name,
                    transport=recording.open_rank(replica.rank),
                    run_id=f"{self.lab.suite.name}-{case.name}-{self._seed}",
                )
            )

    def train(self) -> Trained:
        """Train to the end, evaluate, and close the recording."""
        for step in range(self.lab.num_steps):
            self._step(step)
        for hooks in self._hooks:
            for where, count in hooks.failures().items():
                self.trained.hook_failures[where] = self.trained.hook_failures.get(where, 0) + count
            hooks.close()
        if self._recording is not None:
            self._recording.close()
        self.trained.evaluation = evaluate(self.lab.model, self.lab.suite, self._usual_mix)
        return self.trained

    def _step(self, step: int) -> None:
        lab = self.lab
        lab.step = step
        if step >= lab.onset and not self._is_twisted:
            self._begin()
        twist = self._twist if self._is_twisted else None
        batches = self._loader.step(twist)
        began = time.perf_counter()
        lab.skips_update = False
        losses = [
            self._microbatch(replica, batch, twist)
            for replica, share in zip(lab.replicas, batches, strict=True)
            for batch in share
        ]
        average_gradients(lab)
        self._update(twist)
        self.trained.seconds += time.perf_counter() - began
        self.trained.losses.append(float(np.mean(losses)))
        if self._recording is not None:
            for transport in self._recording.transports:
                transport.drain()

    def _microbatch(self, replica: Replica, batch: Batch, twist: Twist | None) -> float:
        if twist is not None:
            batch = twist.batch(self.lab, replica.rank, batch)
        logits, loss = replica.model(
            batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
        )
        if twist is not None:
            loss = twist.loss(self.lab, replica.rank, batch, logits, loss)
        self._hooks[replica.rank].on_batch(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            attention_mask=batch["attention_mask"],
            logits=logits.detach(),
            loss=loss.detach(),
            shifted=True,
            epoch=batch["epoch"],
        )
        (loss / self.lab.setup.accumulation_steps).backward()
        return float(loss.item())

    def _update(self, twist: Twist | None) -> None:
        lab = self.lab
        rate = lab.suite.learning_rate * lab.setup.rate_factor * rate_share(lab.step, lab.num_steps)
        if twist is not None:
            twist.gradients(lab)
            rate = twist.rate(lab, rate)
        norms = [self._updated(replica, hooks, rate) for replica, hooks in zip(lab.replicas, self._hooks, strict=True)]
        if twist is not None:
            twist.after_step(lab)
        for hooks, norm in zip(self._hooks, norms, strict=True):
            hooks.after_step(lab.step, applied=not lab.skips_update, grad_norm=norm)
        self.trained.gradient_norms.append(math.nan if norms[0] is None else float(norms[0]))

    def _updated(self, replica: Replica, hooks: sidestep.Hooks, rate: float) -> torch.Tensor | None:
        """Clip and step; return the norm, which the product gets as nanoVLM's loop has it."""
        hooks.before_clip()
        norm = None
        if self.lab.setup.max_gradient_norm:
            norm = nn.utils.clip_grad_norm_(replica.model.parameters(), self.lab.setup.max_gradient_norm)
        for group in replica.optimizer.param_groups:
            group["lr"] = rate * float(group.get("rate_share", 1.0))
        if not self.lab.skips_update:
            replica.optimizer.step()
        replica.optimizer.zero_grad(set_to_none=True)
        return norm
