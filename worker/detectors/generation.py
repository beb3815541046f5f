"""What was generated against the targets of the same prompts, both cut at their first EOS and at the same length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.repetition import is_looping, is_nearly_looping
from sidestep.worker.detectors.running import Window, median
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.metrics.sequences import GeneratedSamples, TokenSequence, target_sequences

MAX_JUDGED: Final = 64
"""Samples that are looked at; of more, the first."""
TRAINED_STEPS: Final = 32
"""Last steps whose answers tell how long one is."""
LONG_QUANTILE: Final = 0.9
MIN_TOKENS: Final = 32
"""Content tokens from which a token's share says something."""


class GeneratedAnswers:
    """``gen_repetition``, ``gen_vs_target`` and ``gen_length``, at each step that generated."""

    name = "generation"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._trained = Window(TRAINED_STEPS)  # length of each step's longer answers, without what ends them
        self._is_first_stage = True

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge the samples of a step, if it has any whose targets are known."""
        if view.lengths.size:
            self._trained.add(float(np.quantile(view.lengths, LONG_QUANTILE)) - 1.0)
        generated, context = view.generated, view.context
        if generated is None or context is None:
            return ()
        rows = generated.samples[:MAX_JUDGED]
        sequences = generated.sequences[:MAX_JUDGED]
        targets = target_sequences(context.samples, rows, context.eos_id)
        if len(sequences) < self._settings.gen_repetition.min_samples or len(targets) != len(sequences):
            return ()
        limit = generated.max_new_tokens if generated.max_new_tokens > 0 else None
        cut = [sequence.content[:limit] for sequence in targets]
        return [
            *self._repetition(sequences, cut),
            *self._shares(sequences, cut),
            *self._lengths(generated, sequences, cut),
        ]

    def _repetition(self, sequences: Sequence[TokenSequence], targets: Sequence[Sequence[int]]) -> Iterator[Reading]:
        limit = self._settings.gen_repetition.threshold
        loops, own_loops = (_share(is_looping, ids) for ids in ([s.content for s in sequences], targets))
        near, own_near = (_share(is_nearly_looping, ids) for ids in ([s.content for s in sequences], targets))
        value = max(loops - own_loops, near - own_near)
        evidence = (
            f"{loops:.0%} of the generated answers end in a loop (targets: {own_loops:.0%}), "
            f"{near:.0%} nearly repeat themselves (targets: {own_near:.0%})"
        )
        yield Reading(name="gen_repetition", value=value, limit=limit, is_beyond=value > limit, evidence=evidence)

    def _shares(self, sequences: Sequence[TokenSequence], targets: Sequence[Sequence[int]]) -> Iterator[Reading]:
        """One token's share of the generated content against its share of the targets'."""
        limit = self._settings.gen_vs_target.threshold
        said = Counter(token for sequence in sequences for token in sequence.content)
        meant = Counter(token for ids in targets for token in ids)
        if said.total() < MIN_TOKENS or meant.total() < MIN_TOKENS:
            return
        excess = {token: count / said.total() - meant[token] / meant.total() for token, count in said.items()}
        token = max(excess, key=lambda each: (excess[each], -each))
        value = excess[token]
        evidence = (
            f"{{token}} is {said[token] / said.total():.0%} of the generated tokens and "
            f"{meant[token] / meant.total():.0%} of the targets'"
        )
        yield Reading(
            name="gen_vs_target", value=value, limit=limit, is_beyond=value > limit, token=token, evidence=evidence
        )

    def _lengths(
        self, generated: GeneratedSamples, sequences: Sequence[TokenSequence], targets: Sequence[Sequence[int]]
    ) -> Iterator[Reading]:
        rule = self._settings.gen_length
        endless = sum(not sequence.has_ended for sequence in sequences) / len(sequences)
        cut_off = sum(len(ids) >= generated.max_new_tokens for ids in targets) / len(targets)
        length = median([float(len(sequence.content)) for sequence in sequences])
        usual = median([float(len(ids)) for ids in targets])
        ratio = max((length + 1.0) / (usual + 1.0), (usual + 1.0) / (length + 1.0))
        if not self._is_first_stage and length > usual and len(self._trained) >= TRAINED_STEPS // 2:
            # Samples may be of a stage that is over: no answer is too long that the training's own reach.
            ratio = min(ratio, (length + 1.0) / (self._trained.median() + 1.0))
        is_beyond = ratio > rule.threshold or endless - cut_off > rule.hit_max
        evidence = (
            f"generated answers have a median of {length:g} tokens (targets: {usual:g}); "
            f"{endless:.0%} never end (targets: {cut_off:.0%})"
        )
        yield Reading(name="gen_length", value=ratio, limit=rule.threshold, is_beyond=is_beyond, evidence=evidence)

    def forget(self) -> None:
        """Other answers are trained on."""
        self._trained, self._is_first_stage = Window(TRAINED_STEPS), False

    def state(self) -> Json:
        """Return how long the answers of the last steps are."""
        return {"trained": self._trained.values, "first": self._is_first_stage}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state; one from before there were lengths has none."""
        self._trained.values = [float(value) for value in state.get("trained", ())]
        self._is_first_stage = bool(state.get("first", True))


def _share(test: Any, sequences: Sequence[Sequence[int]]) -> float:
    return sum(bool(test(ids)) for ids in sequences) / len(sequences)
