"""Synthetic steps of a calibrated model that learns, and of one that fails: what the detectors' tests are fed.

Targets are drawn from the model's own predictive distribution, so that a healthy trace is calibrated by construction at
every stage of its learning; a failure is made by breaking exactly one thing from its onset on. Thresholds are not tuned
on these traces: real training does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import SIGNAL_COUNTS, Kind, Message, Probe, Scalars, Signals, StepEnd
from sidestep.worker.records import AssembledStep, Part, RunContext
from sidestep.worker.watch import Watch, WatchVerdict

EOS, PAD, NEWLINE, IMAGE = 1, 0, 2, 3
FIRST_OPTION = 10
VOCABULARY = 600
MODULES = ("vision_encoder", "modality_projector", "language_model")


class Numbers:
    """Ids as numbers."""

    def token(self, token_id: int) -> str:
        return f"t{token_id}"

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(map(self.token, ids))


def context(**changes: Any) -> RunContext:
    table = {"eos_id": EOS, "pad_id": PAD, "vocabulary_size": VOCABULARY, "image_token_id": IMAGE}
    parameters = {
        "modules": list(MODULES),
        "parameters": [{"name": f"{name}.w", "module": place, "param": "w"} for place, name in enumerate(MODULES)],
    }
    told: dict[str, Any] = {"run_id": "run", "attempt": 0, "text": Numbers(), "tokenizer": table}
    return RunContext(**{**told, "parameters": parameters, **changes})


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is answered: a choice among options, or a text."""

    options: int = 4
    prior: tuple[float, ...] = ()
    """Share of each option among the targets; even where empty."""
    length: int = 1
    """Content tokens of an answer."""
    final_loss: float = 0.05
    """What the model's uncertainty of a content token shrinks to, roughly, in nats of logit noise."""
    batch: int = 32
    ranks: int = 1
    learning_steps: float = 150.0
    images: bool = True
    start_skill: float = 0.0


@dataclass(kw_only=True)
class Drawn:
    """One step's rows before they are split over ranks, for failures to change."""

    step: int
    rng: np.random.Generator
    task: Task
    targets: NDArray[np.int64]  # [answers, length + 2]
    probabilities: NDArray[np.float64]  # [answers, length + 2, candidates]
    ids: NDArray[np.int64]  # ids of the candidates [candidates]
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of ``Signals`` that a failure sets."""
    counts: dict[str, int] = field(default_factory=dict)
    applied: bool = True
    stage: str = ""
    rate: float = 1e-3
    extra: list[Message] = field(default_factory=list)
    rank_changes: dict[int, dict[str, Any]] = field(default_factory=dict)
    loss_shift: dict[int, float] = field(default_factory=dict)


Failure = Callable[[Drawn], None]


def trace(
    task: Task, steps: int, *, seed: int = 0, failure: Failure | None = None, onset: int = 0, first: int = 0
) -> Iterator[AssembledStep]:
    """Yield ``steps`` steps; from ``onset`` on each is changed by ``failure``."""
    for step in range(first, first + steps):
        drawn = draw(task, step, np.random.default_rng([seed, step]))
        if failure is not None and step >= onset:
            failure(drawn)
        yield assembled(drawn)


def draw(task: Task, step: int, rng: np.random.Generator) -> Drawn:
    """Draw a step of a model that has learned for ``step`` steps."""
    skill = max(task.start_skill, 1.0 - np.exp(-step / task.learning_steps))
    prior = np.maximum(np.array(task.prior or (1.0 / task.options,) * task.options), 1e-9)
    sharp = skill * (6.0 - 2.0 * np.log(max(task.final_loss, 1e-3)))
    shape = (task.batch, task.length, task.options)
    # A noisy look at a hidden truth drawn from the prior: the posterior is calibrated by construction.
    truth = (rng.random(shape[:2])[..., None] > np.cumsum(prior)).sum(-1)
    seen = rng.normal(0.0, 1.0, shape) + np.sqrt(sharp) * (np.arange(task.options) == truth[..., None])
    logits = np.log(prior) + np.sqrt(sharp) * seen
    content = np.exp(logits - logits.max(-1, keepdims=True))
    content /= content.sum(-1, keepdims=True)
    # What the format's own tokens (EOS, newline) still lack of certainty is spread over the options.
    blur = 0.5 * np.exp(-step / 20.0) if not task.start_skill else 0.002
    blur = max(blur, 0.0005)
    candidates = task.options + 2
    ids = np.concatenate([np.arange(task.options) + FIRST_OPTION, [EOS, NEWLINE]])
    probabilities = np.zeros((task.batch, task.length + 2, candidates))
    probabilities[:, : task.length, : task.options] = content * (1.0 - blur / task.length)
    probabilities[:, : task.length, task.options :] = blur / task.length / 2
    for place, token in ((task.length, task.options), (task.length + 1, task.options + 1)):
        probabilities[:, place] = blur / (candidates - 1)
        probabilities[:, place, token] = 1.0 - blur
    targets = np.concatenate(
        [truth, np.full((task.batch, 1), task.options), np.full((task.batch, 1), task.options + 1)], axis=1
    )
    return Drawn(step=step, rng=rng, task=task, targets=targets, probabilities=probabilities, ids=ids)


def assembled(drawn: Drawn) -> AssembledStep:
    """Return the step as its ranks would have sent it."""
    parts: list[Part] = []
    for rank in range(drawn.task.ranks):
        mine = slice(rank, None, drawn.task.ranks)
        parts.append(Part(rank=rank, message=_signals(drawn, mine, rank)))
    found: dict[Kind, tuple[Part, ...]] = {Kind.SIGNALS: tuple(parts)}
    for message in drawn.extra:
        found[Kind(message.kind)] = (Part(rank=0, message=message),)
    end = StepEnd(step=drawn.step, unix_time=float(drawn.step), applied=drawn.applied, stage=drawn.stage)
    return AssembledStep(
        run_id="run",
        attempt=0,
        step=drawn.step,
        reason="complete",
        parts=found,
        ends=dict.fromkeys(range(drawn.task.ranks), end),
        ranks_expected=drawn.task.ranks,
        ranks_seen=drawn.task.ranks,
    )


def _signals(drawn: Drawn, mine: slice, rank: int) -> Signals:
    probabilities, places = drawn.probabilities[mine], drawn.targets[mine]
    answers, length = places.shape
    flat = probabilities.reshape(answers * length, -1)
    targets = places.reshape(-1)
    chosen = np.maximum(flat[np.arange(targets.size), targets], 1e-12)
    losses = -np.log(chosen) + drawn.loss_shift.get(rank, 0.0)
    entropies = -(flat * np.log(np.maximum(flat, 1e-12))).sum(-1)
    mean = flat.mean(0)
    order = np.argsort(-mean, kind="stable")[:64]
    rng = np.random.default_rng([drawn.step, rank, 7])
    hashes = rng.integers(1, 2**62, answers)
    weights = np.random.default_rng([drawn.step, 11]).normal(size=8)
    total = targets.size
    counts = {
        "positions": total + 20 * answers,
        "padding": 0,
        "compared": total,
        "labelled": total,
        "labels_equal_ids": 0,
        "labels_equal_next_ids": total,
        "labels_masked": 0,
        "answers": answers,
        "answers_with_eos": answers,
        "batches": 1,
        "batches_without_labels": 0,
        **drawn.counts,
    }
    images = rng.integers(1, 2**62, answers) if drawn.task.images else np.zeros(0, np.int64)
    gradient = float(np.exp(rng.normal(0.0, 0.15)) * (0.3 + losses.mean()))
    values: dict[str, Any] = {
        "step": drawn.step,
        "counts": np.array([counts.get(name, -1) for name in SIGNAL_COUNTS], np.int64),
        "labelled": total,
        "vocabulary": VOCABULARY,
        "targets": drawn.ids[targets].astype(np.int32),
        "predictions": drawn.ids[flat.argmax(-1)].astype(np.int32),
        "losses": losses.astype(np.float16),
        "entropies": entropies.astype(np.float16),
        "eos_probabilities": flat[:, drawn.task.options].astype(np.float16),
        "places": np.tile(np.minimum(np.arange(length), 255), answers).astype(np.uint8),
        "answers": np.repeat(np.arange(answers), length).astype(np.uint16),
        "top_probability": float(flat.max(-1).mean()),
        "mean_ids": drawn.ids[order].astype(np.int32),
        "mean_probabilities": mean[order].astype(np.float32),
        "trainer_losses": np.array([losses.mean()], np.float32),
        "sample_hashes": hashes,
        "image_hashes": images,
        "image_deviations": np.full(images.size, 0.25, np.float32),
        "projector_rms": 0.7 if drawn.task.images else -1.0,
        "projector_spread": 0.2 if drawn.task.images else -1.0,
        "gradient_norm": np.array([gradient], np.float32),
        "module_norms": np.array([0.2, 0.1, 0.9], np.float32) * np.float32(gradient),
        "heartbeat": weights.astype(np.float32),
        "heartbeat_digest": 5,
        "rates": np.array([drawn.rate]),
        "step_seconds": 0.1,
    }
    return Signals(**{**values, **drawn.changes, **drawn.rank_changes.get(rank, {})})


def probe(step: int, gain: float, *, loss: float = 1.0) -> Probe:
    return Probe(step=step, loss=loss, rolled_loss=loss + gain, labelled=96, images=32)


def logged(step: int, values: Mapping[str, float]) -> Scalars:
    return Scalars(step=step, values=values)


def to_one_token(share: float, option: int = 0) -> Failure:
    """The model gives ``share`` of its probability at content rows to one option, whatever is asked."""

    def fail(drawn: Drawn) -> None:
        content = drawn.probabilities[:, : drawn.task.length]
        content *= 1.0 - share
        content[..., option] += share

    return fail


def relabelled(option: int = 0) -> Failure:
    """All targets become one option; the model learns it within some 30 steps."""

    def fail(drawn: Drawn) -> None:
        drawn.targets[:, : drawn.task.length] = option

    return fail


def changed(**changes: Any) -> Failure:
    """Set fields of every rank's ``Signals``."""

    def fail(drawn: Drawn) -> None:
        drawn.changes.update(changes)

    return fail


def counted(**counts: int) -> Failure:
    """Set counts of every rank's ``Signals``."""

    def fail(drawn: Drawn) -> None:
        drawn.counts.update(counts)

    return fail


def shuffled_targets(drawn: Drawn) -> None:
    """Answers of other samples."""
    drawn.targets[:] = drawn.targets[drawn.rng.permutation(drawn.targets.shape[0])]


def with_ranks(task: Task, ranks: int) -> Task:
    return replace(task, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a watch said over a trace."""

    verdicts: dict[int, WatchVerdict]
    """Step to its verdict."""

    @property
    def lines(self) -> list[tuple[int, str]]:
        """(step, line) of every announcement."""
        return [(step, each.line) for step, verdict in self.verdicts.items() for each in verdict.announcements]

    @property
    def openings(self) -> list[tuple[int, str]]:
        """(step, incident) of every row of an incident that opened or got worse."""
        return [
            (step, key.removeprefix("incidents/"))
            for step, verdict in self.verdicts.items()
            for key, value in verdict.values.items()
            if key != "incidents/open" and value == 1
        ]

    @property
    def blocks(self) -> str:
        """All announcements' blocks, joined."""
        return "\n".join(
            line for verdict in self.verdicts.values() for each in verdict.announcements for line in each.block
        )


def watched(steps: Iterable[AssembledStep], watch: Watch | None = None, **changes: Any) -> Told:
    """Let a watch look at every step."""
    watch = watch or Watch()
    told = context(**changes)
    return Told(verdicts={step.step: watch.observe(step, told) for step in steps})
