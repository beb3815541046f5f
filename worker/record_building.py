"""From an assembled step to its record: ranks merged, contradictions left out, sizes bounded; pure and deterministic.

Ranks that are tensor-parallel copies of another one count once where batches are counted (docs/metrics.md, "All
ranks"), and each for itself where weights are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from sidestep.protocol.messages import Gradients, Kind, LearningRates, Losses, Probe, Signals
from sidestep.protocol.signals import GROUP_SETTINGS, PROMPT_COUNTS, SIGNAL_COUNTS
from sidestep.worker.copy_norms import whole_norms
from sidestep.worker.metrics.measurement import distinct_batches, messages_of
from sidestep.worker.record_batches import batch_facts
from sidestep.worker.record_rows import mean_facts, row_facts, sound_rows
from sidestep.worker.record_weights import module_facts, weight_facts
from sidestep.worker.records import AssembledStep, Part, RunContext
from sidestep.worker.scalar_reduction import spoken_scalars
from sidestep.worker.step_record import MAX_LOGGED, MAX_LOGGED_NAME_BYTES, MAX_RATES, StepRecord

MAX_COUNT: Final = 1 << 53
MAX_STAGE_CHARACTERS: Final = 64


def build_record(step: AssembledStep, context: RunContext) -> StepRecord:
    """Return the record of a closed step; what was not sent is absent in it."""
    parts = step.parts.get(Kind.SIGNALS, ())
    first_of_rank = _one_a_rank(parts)
    signals = messages_of(distinct_batches(first_of_rank, context), Signals)
    ends = [end for _, end in sorted(step.ends.items())]
    applied = all(end.applied for end in ends) if ends else None
    rows = sound_rows(signals)
    facts: dict[str, Any] = {**row_facts(rows), **mean_facts([message for _, message in signals], rows)}
    facts.update(batch_facts(signals))
    facts.update(weight_facts(messages_of(first_of_rank, Signals)))
    facts.update(module_facts(messages_of(first_of_rank, Signals), context))
    norms = whole_norms(messages_of(first_of_rank, Signals), context)
    facts.update(_gradient_facts(step, list(norms.values()), is_applied=applied is not False))
    facts.update(_loss_facts(step, signals, facts))
    facts.update(_probe_facts(step))
    return StepRecord(
        attempt=step.attempt,
        step=step.step,
        stage=step.stage[:MAX_STAGE_CHARACTERS],
        applied=applied,
        ranks_expected=step.ranks_expected,
        ranks_seen=step.ranks_seen,
        eos_id=_id(context.eos_id),
        pad_id=_id(context.pad_id),
        image_token_id=_id(context.image_token_id),
        counts=_counts([message for _, message in signals]),
        labelled=sum(max(0, min(message.labelled, MAX_COUNT)) for _, message in signals),
        vocabulary=max(
            (min(message.vocabulary, MAX_COUNT) for _, message in signals if message.vocabulary > 0), default=0
        ),
        rates=_rates(step, [message for _, message in signals]),
        optimizer_steps=_optimizer_steps([message for _, message in signals]),
        group_settings=_group_settings([message for _, message in signals]),
        gradients_lost=max((_count(message.gradients_lost) for _, message in signals), default=0),
        step_seconds=_seconds([message for _, message in signals]),
        logged=_logged(step.parts.get(Kind.SCALARS, ())),
        **facts,
    )


def _one_a_rank(parts: Sequence[Part]) -> list[Part]:
    kept: dict[int, Part] = {}
    for part in parts:
        kept.setdefault(part.rank, part)
    return [kept[rank] for rank in sorted(kept)]


def _id(value: int | None) -> int:
    return value if value is not None and 0 <= value < MAX_COUNT else -1


def _counts(signals: Sequence[Signals]) -> Mapping[str, int]:
    """Sum each count over ranks; one that a rank does not know, or is negative, is known of none.

    Prompts are what the first rank has: they are counted by those that do.
    """
    found: dict[str, int] = {}
    if not signals:
        return found
    known = [m.counts.tolist() if m.counts.ndim == 1 else [] for m in signals]
    for name, *values in zip(SIGNAL_COUNTS, *known, strict=False):  # what the shortest of them has
        given = [value for value in values if value >= 0]
        if given and (len(given) == len(values) or name in PROMPT_COUNTS):
            found[name] = min(sum(given), MAX_COUNT)
    return found


def _loss_facts(step: AssembledStep, signals: Sequence[tuple[int, Signals]], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Count what is not finite before any filter hides it, and let the trainer's own number stand in for the rows'."""
    due = [message for _, message in messages_of(step.parts.get(Kind.LOSSES, ()), Losses)]
    own = [float(value) for _, message in signals for value in message.trainer_losses.reshape(-1).tolist()]
    own = own or [float(value) for message in due for value in message.trainer_loss.reshape(-1).tolist()]
    nonfinite = sum(int((~np.isfinite(message.losses)).sum()) for message in due)
    nonfinite += sum(_count(message.partials[5]) for message in due if message.partials.shape == (10,))
    finite = [value for value in own if math.isfinite(value)]
    loss = rows.get("loss")
    if loss is None and finite:
        loss = math.fsum(finite) / len(finite)
    return {
        "loss": loss,
        "trainer_loss": math.fsum(finite) / len(finite) if finite else None,
        "nonfinite_losses": min(nonfinite + int(rows.get("nonfinite_losses", 0)), MAX_COUNT),
        "nonfinite_trainer_losses": len(own) - len(finite),
    }


def _count(value: float) -> int:
    return int(min(max(value, 0.0), float(MAX_COUNT))) if math.isfinite(value) else 0


def _gradient_facts(step: AssembledStep, norms: Sequence[float], *, is_applied: bool) -> dict[str, Any]:
    """Norms of a skipped step are a GradScaler's business: infinite ones are how it finds its factor."""
    if not is_applied:
        return {"nonfinite_gradients": 0, "gradient_norm": None}
    due = [message for _, message in messages_of(step.parts.get(Kind.GRADIENTS, ()), Gradients)]
    is_bad = any(not math.isfinite(norm) for norm in norms) or any((message.nonfinite > 0).any() for message in due)
    finite = [norm for norm in norms if math.isfinite(norm) and norm >= 0]
    return {"nonfinite_gradients": int(is_bad), "gradient_norm": max(finite, default=None)}


def _probe_facts(step: AssembledStep) -> dict[str, Any]:
    """Mean of the ranks' probes, weighted by their labelled positions."""
    sent = [probe for _, probe in messages_of(step.parts.get(Kind.PROBE, ()), Probe)]
    probes = [
        probe
        for probe in sent
        if probe.images >= 2 and 0 < probe.labelled <= MAX_COUNT and math.isfinite(probe.loss + probe.rolled_loss)
    ]
    total = sum(probe.labelled for probe in probes)
    facts: dict[str, Any] = {}
    if total:
        facts["probe_loss"] = sum(probe.loss * (probe.labelled / total) for probe in probes)
        facts["probe_rolled_loss"] = sum(probe.rolled_loss * (probe.labelled / total) for probe in probes)
        facts["probe_labelled"] = min(total, MAX_COUNT)
    for name in ("future", "apart", "padding", "image", "last_image", "misplaced"):
        changes = [getattr(probe, f"{name}_change") for probe in sent if getattr(probe, f"{name}_rows") > 0]
        finite = [change for change in changes if math.isfinite(change)]
        if finite:
            facts[f"{name}_change"] = max(finite)
    return facts


def _rates(step: AssembledStep, signals: Sequence[Signals]) -> Any:
    sent = [message.rates for message in signals if message.rates.size]
    sent += [m.rates for _, m in messages_of(step.parts.get(Kind.LEARNING_RATES, ()), LearningRates) if m.rates.size]
    rates = sent[0].reshape(-1)[:MAX_RATES].astype(np.float64) if sent else np.zeros(0, np.float64)
    return rates if np.isfinite(rates).all() else np.zeros(0, np.float64)


def _optimizer_steps(signals: Sequence[Signals]) -> float | None:
    """The longest trained group's, of the rank where that is lowest: a group that joins later begins to count then."""
    counts = [message.optimizer_steps.reshape(-1) for message in signals]
    longest = [float(each.max()) for each in counts if each.size]
    return min((count for count in longest if math.isfinite(count) and 0 <= count < MAX_COUNT), default=None)


def _group_settings(signals: Sequence[Signals]) -> Any:
    sent = next((message.group_settings.reshape(-1) for message in signals if message.group_settings.size), None)
    if sent is None or sent.size % len(GROUP_SETTINGS):
        return np.zeros(0, np.float32)
    return sent[: MAX_RATES * len(GROUP_SETTINGS)].astype(np.float32)


def _seconds(signals: Sequence[Signals]) -> float | None:
    spent = [m.step_seconds - max(m.wait_seconds, 0.0) for m in signals if m.step_seconds >= 0]
    return max((value for value in spent if math.isfinite(value) and value >= 0), default=None)


def _logged(parts: Sequence[Part]) -> Mapping[str, float]:
    """Numbers by name, of ranks as they are shown; of long names and many names only the first."""
    found: dict[str, float] = {}
    for _, message in spoken_scalars(parts):
        for name, value in message.values.items():
            is_short = len(name.encode("utf-8", "replace")) <= MAX_LOGGED_NAME_BYTES
            if is_short and isinstance(value, int | float) and abs(value) < MAX_COUNT:
                found.setdefault(name, float(value))
    return {name: found[name] for name in sorted(found)[:MAX_LOGGED]}
