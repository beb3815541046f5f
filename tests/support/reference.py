"""Every metric again, from raw tensors, plainly: float64, numpy, loops over rows, nothing of Sidestep imported.

Written from docs/metrics.md alone, so that it can disagree with the product.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the metrics must know of the tokenizer."""

    size: int
    eos: int
    image: int


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """One micro-batch as it was recorded: [B, T] and logits [B, T, V]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    mask: NDArray[np.int64]
    logits: NDArray[np.float64]
    loss: float
    shifted: bool

    def targets(self) -> NDArray[np.int64]:
        """Return the target of each position of the logits, IGNORE where there is none."""
        if self.shifted:
            return self.labels
        moved = np.full_like(self.labels, IGNORE)
        moved[:, :-1] = self.labels[:, 1:]
        return moved


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One maximal run of labelled positions: its targets and where its content and first EOS are."""

    targets: list[int]
    losses: list[float]
    eos: int

    @property
    def content(self) -> list[int]:
        return self.targets[: self.targets.index(self.eos)] if self.eos in self.targets else self.targets

    @property
    def later(self) -> list[float]:
        """Losses after the first position, up to and with the first EOS."""
        end = self.targets.index(self.eos) + 1 if self.eos in self.targets else len(self.targets)
        return self.losses[1:end]


def cross_entropy(logits: NDArray[np.float64], target: int) -> float:
    largest = float(logits.max())
    return math.log(float(np.exp(logits - largest).sum())) - (float(logits[target]) - largest)


def answers_of(batch: RawBatch, eos: int) -> list[Answer]:
    found = []
    targets = batch.targets()
    for row in range(targets.shape[0]):
        run: tuple[list[int], list[float]] = ([], [])
        for place in [*range(targets.shape[1]), None]:
            target = IGNORE if place is None else int(targets[row, place])
            if target != IGNORE:
                run[0].append(target)
                run[1].append(cross_entropy(batch.logits[row, place], target))
            elif run[0]:
                found.append(Answer(targets=run[0], losses=run[1], eos=eos))
                run = ([], [])
    return found


def mean_or_none(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def token_metrics(batches: Sequence[RawBatch], vocabulary: Vocabulary) -> dict[str, float]:
    positions = sum(batch.input_ids.size for batch in batches)
    real = [int(i) for batch in batches for i in batch.input_ids[batch.mask != 0]]
    answers = [answer for batch in batches for answer in answers_of(batch, vocabulary.eos)]
    labelled = [token for answer in answers for token in answer.targets]
    content = [token for answer in answers for token in answer.content]
    return {
        "tokens/total_tokens": positions,
        "tokens/unique_tokens": len(set(real)),
        "tokens/unique_token_ratio": len(set(real)) / vocabulary.size,
        "tokens/eos_count": real.count(vocabulary.eos),
        "tokens/pad_ratio": (positions - len(real)) / positions,
        "tokens/image_token_ratio": real.count(vocabulary.image) / len(real),
        "tokens/answer_length": len(content) / len(answers),
        "tokens/answer_diversity_ratio": max(Counter(content).values()) / len(content),
        "tokens/answers": len(answers),
        "tokens/answer_tokens": len(labelled),
        "tokens/unique_answer_tokens": len(set(labelled)),
        "tokens/answer_eos_count": labelled.count(vocabulary.eos),
    }


def loss_metrics(batches: Sequence[RawBatch], vocabulary: Vocabulary) -> dict[str, float]:
    answers = [answer for batch in batches for answer in answers_of(batch, vocabulary.eos)]
    losses = np.array([loss for answer in answers for loss in answer.losses])
    mean, std = float(losses.mean()), float(losses.std(ddof=1))
    first = float(np.mean([answer.losses[0] for answer in answers]))
    later = float(np.mean([loss for answer in answers for loss in answer.later]))
    return {
        "loss/total": mean,
        "loss/first_token": first,
        "loss/later_tokens": later,
        "loss/std": std,
        "loss/max": float(losses.max()),
        "loss/min": float(losses.min()),
        "loss/high_loss_token_ratio": float((losses > mean + 2 * std).mean()),
        "loss/first_vs_later_ratio": first / later,
        "loss/nonfinite_tokens": 0,
        "loss/trainer": float(np.mean([batch.loss for batch in batches])),
        "loss/exact": 1,
    }


def gradient_metrics(gradients: Mapping[str, NDArray[np.float64] | None]) -> dict[str, float]:
    """Return ``gradients/*`` of full parameter names; the module is the first component, as in the demo's model."""
    values: dict[str, float] = {}
    squares: dict[str, float] = {}
    norms = []
    elements = zeros = missing = 0
    for name, gradient in gradients.items():
        if gradient is None:
            missing += 1
            continue
        module, _, param = name.partition(".")
        key = f"gradients/{module}/{param.replace('.', '_')}"
        norm = float(np.sqrt(np.square(gradient).sum()))
        values[f"{key}/norm"] = norm
        values[f"{key}/mean"] = float(gradient.mean())
        if gradient.size > 1:
            values[f"{key}/std"] = float(gradient.std(ddof=1))
        values[f"{key}/max"] = float(np.abs(gradient).max())
        squares[module] = squares.get(module, 0.0) + norm**2
        norms.append(norm)
        elements += gradient.size
        zeros += int((gradient == 0).sum())
    values |= {f"gradients/{module}/norm": math.sqrt(square) for module, square in squares.items()}
    values["gradients/global/total_norm"] = math.sqrt(sum(squares.values()))
    values["gradients/global/avg_norm"] = float(np.mean(norms))
    values["gradients/global/nonfinite"] = 0
    values["gradients/global/zero_ratio"] = zeros / elements
    values["gradients/global/params_without_grad"] = missing
    values["gradients/global/clipped"] = 0
    return values


def log10_histogram(gradients: Sequence[NDArray[np.float64]]) -> list[int]:
    """Return counts over 64 equal bins of [-12, 4]; what lies outside counts in the first or last bin."""
    counts = [0] * 64
    for value in np.abs(np.concatenate([gradient.reshape(-1) for gradient in gradients])):
        if value > 0:
            counts[min(max(math.floor((math.log10(value) + 12) * 4), 0), 63)] += 1
    return counts


def answer_length_metrics(lengths: Sequence[int], epoch: int) -> dict[str, Any]:
    values = {
        "answer_length_mean": float(np.mean(lengths)),
        "answer_length_std": float(np.std(lengths, ddof=1)),
        "answer_length_min": min(lengths),
        "answer_length_max": max(lengths),
        "single_token_answers_ratio": sum(length == 1 for length in lengths) / len(lengths),
    }
    suffixed = {f"data/{name}_epoch_{epoch}": value for name, value in values.items()}
    return suffixed | {f"data/{name}": value for name, value in values.items()}


def cut(ids: Sequence[int], eos: int) -> tuple[list[int], bool]:
    """Return the content of a generation and whether it ended."""
    plain = list(ids)
    return (plain[: plain.index(eos)], True) if eos in plain else (plain, False)


def generation_metrics(generated: Sequence[Sequence[int]], vocabulary: Vocabulary) -> dict[str, float]:
    pieces = [cut(ids, vocabulary.eos) for ids in generated]
    lengths = [len(content) for content, _ in pieces]
    return {
        "generation/avg_length": float(np.mean(lengths)),
        "generation/min_length": min(lengths),
        "generation/max_length": max(lengths),
        "generation/empty_ratio": sum(length == 0 for length in lengths) / len(lengths),
        "generation/hit_max_ratio": sum(not ended for _, ended in pieces) / len(pieces),
        "generation/failed": 0,
    }


def collapse_metrics(generated: Sequence[Sequence[int]], vocabulary: Vocabulary) -> dict[str, float | str]:
    pieces = [cut(ids, vocabulary.eos) for ids in generated]
    content = [token for piece, _ in pieces for token in piece]
    num_eos = sum(ended for _, ended in pieces)
    sequences = {tuple(piece) for piece, _ in pieces}
    ratio = max(Counter(content).values()) / len(content) if content else None
    eos_ratio = num_eos / (len(content) + num_eos) if content or num_eos else None
    rules = {
        "single_token_dominance": ratio is not None and ratio > 0.70,
        "low_diversity": len(content) >= 50 and len(set(content)) < 10,
        "identical_sequences": len(pieces) >= 2 and len(sequences) == 1,
        "excessive_eos": eos_ratio is not None and eos_ratio > 0.80,
    }
    reason = "+".join(name for name, holds in rules.items() if holds) or "none"
    reason = reason if content else "no_tokens_generated"
    values: dict[str, float | str] = {
        "collapse/is_collapsed": int(reason != "none"),
        "collapse/collapse_reason": reason,
        "collapse/total_tokens": len(content),
        "collapse/unique_tokens": len(set(content)),
        "collapse/unique_sequences": len(sequences),
        **{f"collapse/rule/{name}": int(holds) for name, holds in rules.items()},
    }
    if ratio is not None:
        values["collapse/most_common_ratio"] = ratio
        values["collapse/token_diversity"] = len(set(content)) / len(content)
    if eos_ratio is not None:
        values["collapse/eos_ratio"] = eos_ratio
    return values


def assert_equal(
    found: Mapping[str, Any], expected: Mapping[str, Any], step: int, absolute: Mapping[str, float] | None = None
) -> None:
    """Hold what a run says of a step against the reference, within docs/metrics.md's tolerance ("Numerics")."""
    for key, value in expected.items():
        assert key in found, f"step {step}: {key} is absent, should be {value}"
        if isinstance(value, str):
            assert found[key] == value, f"step {step}: {key}"
            continue
        slack = 1e-5 * abs(value) + (1e-6 if key.startswith("loss/") else 0.0) + (absolute or {}).get(key, 0.0)
        assert math.isclose(found[key], value, rel_tol=0.0, abs_tol=slack), (
            f"step {step}: {key} {found[key]} != {value}"
        )
