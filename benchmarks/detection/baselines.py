"""What others do, on the same runs: published loss and gradient rules, and the user's four rules in three readings.

Each rule says at which steps it speaks; how these are grouped and counted is the same for all (`score.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from benchmarks.detection.judge import assembled_steps

from sidestep.protocol.messages import Kind
from sidestep.protocol.metric_names import NO_TOKENS_GENERATED
from sidestep.worker.detectors.user_rules import SequenceCounts, rules_of
from sidestep.worker.metrics.sequences import GeneratedSamples, TokenSequence, read_generated, target_sequences
from sidestep.worker.records import RunContext
from sidestep.worker.settings import RunSettings

OLMO_WINDOW, OLMO_SIGMAS = 128, 6.0
KILL_PATIENCE, KILL_FACTOR, KILL_CAP = 5, 2.0, 10.0
NEVER_ENDED = -1


def olmo_rule(values: Sequence[float]) -> list[int]:
    """Return steps above mean + 6 standard deviations of the last 128 (OLMo-core, `SkipStepOptimizer`)."""
    spoken = []
    window: deque[float] = deque(maxlen=OLMO_WINDOW)
    for step, value in enumerate(values):
        if not math.isfinite(value):
            spoken.append(step)
            continue
        if len(window) == OLMO_WINDOW and value > np.mean(window) + OLMO_SIGMAS * np.std(window):
            spoken.append(step)
        window.append(value)
    return spoken


def kill_loss_spike(losses: Sequence[float]) -> list[int]:
    """Return steps at which llm-foundry's `KillLossSpike` would end the run.

    Window: 100 steps or a twentieth of the run, the larger. Five losses in a row of twice the window's mean; or half of
    the window above the largest loss of the first one, which is taken as 10 at most.
    """
    size = max(100, len(losses) // 20)
    window: deque[float] = deque(maxlen=size)
    spoken, in_row = [], 0
    cap = KILL_CAP
    for step, loss in enumerate(losses):
        if len(window) == size:
            if step == size:
                cap = min(KILL_CAP, max(window))
            mean = float(np.mean(window))
            in_row = in_row + 1 if not loss < KILL_FACTOR * mean else 0
            is_high = sum(not each < cap for each in window) > size / 2
            if in_row >= KILL_PATIENCE or is_high:
                spoken.append(step)
        window.append(loss)
    return spoken


def scalar_rules(losses: Sequence[float], norms: Sequence[float]) -> dict[str, list[int]]:
    """Return each published rule's steps."""
    either = set(olmo_rule(losses)) | set(olmo_rule(norms))
    return {
        "olmo_6sd_loss": olmo_rule(losses),
        "olmo_6sd_loss_or_gradient": sorted(either),
        "kill_loss_spike": kill_loss_spike(losses),
    }


def user_rules(path: Path) -> tuple[dict[str, list[int]], int]:
    """Return the steps at which the user's rules are true, by reading, and how many generations were checked.

    `literal` counts as nanoVLM's `generate` returns ids: what follows an answer's first EOS is EOS, to the longest
    answer that may be. `trimmed` counts up to the first EOS. `target_relative` leaves out a rule that is true on the
    targets of the same prompts.
    """
    spoken: dict[str, list[int]] = {"user_literal": [], "user_trimmed": [], "user_target_relative": []}
    num_checks = 0
    for step, context in assembled_steps(path):
        parts = step.parts.get(Kind.GENERATION, ())
        generated = read_generated(parts, context.eos_id) if parts else None
        if generated is None or not generated.sequences:
            continue
        num_checks += 1
        longest = max(getattr(part.message, "max_new_tokens", 0) for part in parts)
        for name, is_true in _readings(generated, context, longest).items():
            if is_true:
                spoken[f"user_{name}"].append(step.step)
    return spoken, num_checks


def _readings(generated: GeneratedSamples, context: RunContext, longest: int) -> Mapping[str, bool]:
    settings = RunSettings.from_map(context.settings)
    rules = rules_of(SequenceCounts.of(generated.sequences), settings)
    targets = target_sequences(context.samples, generated.samples, context.eos_id)
    on_targets = rules_of(SequenceCounts.of(targets), settings)
    own = [name for name in rules if name != NO_TOKENS_GENERATED]
    return {
        "literal": _literal(generated.sequences, context.eos_id, longest, settings),
        "trimmed": any(rules[name] for name in own),
        "target_relative": any(rules[name] and not on_targets[name] for name in own),
    }


def _literal(sequences: Sequence[TokenSequence], eos_id: int | None, longest: int, settings: RunSettings) -> bool:
    """The rules on arrays of `longest` ids, filled with EOS, EOS counted like any other id."""
    eos = NEVER_ENDED if eos_id is None else eos_id
    rows = [(*each.content, *[eos] * (longest - len(each.content))) for each in sequences]
    ids = np.array([token for row in rows for token in row[:longest]])
    _, counts = np.unique(ids, return_counts=True)
    return bool(
        counts.max() / ids.size > settings.single_token_dominance
        or (ids.size >= settings.low_diversity_min_tokens and counts.size < settings.low_diversity_unique_tokens)
        or (len(rows) > 1 and len(set(rows)) == 1)
        or float(np.mean(ids == eos)) > settings.excessive_eos
    )
