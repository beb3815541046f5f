"""The user's four rules of model collapse, and when they are said aloud (docs/metrics.md, ``collapse/``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.protocol.metric_names import COLLAPSE_LINE, COLLAPSE_RULES, NO_TOKENS_GENERATED
from sidestep.worker.detectors.base import Finding, Observation, Verdict
from sidestep.worker.detectors.binomial import is_clearly_below
from sidestep.worker.metrics.measurement import Measurement, most_common
from sidestep.worker.metrics.sequences import GeneratedSamples, TokenSequence, sample_row, target_sequences
from sidestep.worker.records import TokenText
from sidestep.worker.settings import RunSettings

REASON_BITS: Final[Mapping[str, int]] = {
    "single_token_dominance": 1,
    "low_diversity": 2,
    "identical_sequences": 4,
    "excessive_eos": 8,
    NO_TOKENS_GENERATED: 16,
}
"""``collapse/reason_code`` is the sum of these over the reason's rules; 0 is ``none``. Numbers are never used again."""

MAX_EPISODES: Final = 64
"""Changes of the armed state that are remembered for a rollback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arming:
    """What the rules may say, from a step on."""

    step: int = -1
    is_armed: bool = False
    """A verdict of this stage was 0."""
    is_said: bool = False
    """The present episode was said aloud."""
    since: int = 0
    """The stage's first step, from which the deadline counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCounts:
    """What the rules are made of, counted over some sequences."""

    num_sequences: int
    num_distinct: int
    num_content: int
    num_eos: int
    unique_tokens: int
    common: tuple[int, int] | None
    """Id and count of the most common content token, the smallest id among equals."""

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> SequenceCounts:
        """Count ``sequences``."""
        content = Counter(token for sequence in sequences for token in sequence.content)
        return cls(
            num_sequences=len(sequences),
            num_distinct=len({sequence.content for sequence in sequences}),
            num_content=content.total(),
            num_eos=sum(sequence.has_ended for sequence in sequences),
            unique_tokens=len(content),
            common=most_common(content.keys(), content.values()),
        )

    @property
    def common_ratio(self) -> float | None:
        """Share of the most common token among the content; None without content."""
        return self.common[1] / self.num_content if self.common is not None else None

    @property
    def eos_ratio(self) -> float | None:
        """Share of EOS among content and EOS; None without either."""
        total = self.num_content + self.num_eos
        return self.num_eos / total if total else None


def rules_of(counts: SequenceCounts, settings: RunSettings) -> dict[str, bool]:
    """Return each rule, literally; ``no_tokens_generated`` last."""
    return {
        "single_token_dominance": (counts.common_ratio or 0.0) > settings.single_token_dominance,
        "low_diversity": (
            counts.num_content >= settings.low_diversity_min_tokens
            and counts.unique_tokens < settings.low_diversity_unique_tokens
        ),
        "identical_sequences": counts.num_sequences >= 2 and counts.num_distinct == 1,
        "excessive_eos": (counts.eos_ratio or 0.0) > settings.excessive_eos,
        NO_TOKENS_GENERATED: counts.num_sequences > 0 and counts.num_content == 0,
    }


FEW_SEQUENCES: Final = 32
"""Targets below which a share of them is held against chance before it tells output and targets apart."""


def doubted_rules(
    targets: Sequence[TokenSequence],
    outputs: Sequence[TokenSequence],
    own: SequenceCounts,
    said: SequenceCounts,
    settings: RunSettings,
) -> frozenset[str]:
    """Return the rules that few targets may break by chance as these outputs do, which has the benefit of that doubt.

    16 samples of data that are 85 % "A" may hold 10 of it, and a model that knows no better says 16: what the output
    says over and over is excused where the targets could say it in over 70 % by chance, by the exact binomial bound.
    Where they never say it, it is not. Targets of too few tokens for ``low_diversity`` excuse an output with no fewer
    distinct tokens than theirs.

    Args:
        targets: of the prompts; without any there is no doubt.
        outputs: what was generated for them.
        own: counts of ``targets``.
        said: counts of ``outputs``.
        settings: of the run.
    """
    found = set()
    if targets and own.num_content < settings.low_diversity_min_tokens and said.unique_tokens >= own.unique_tokens:
        found.add("low_diversity")
    if len(targets) >= FEW_SEQUENCES:
        return frozenset(found)
    share = settings.single_token_dominance
    token = said.common[0] if said.common is not None else None
    hits = sum(sequence.content.count(token) for sequence in targets) if token is not None else 0
    if hits > 0 and not is_clearly_below(hits, own.num_content, share):
        found.add("single_token_dominance")
    alike = sum(sequence.content == outputs[0].content for sequence in targets)
    if alike > 0 and not is_clearly_below(alike, len(targets), share):
        found.add("identical_sequences")
    return frozenset(found)


def answers_once(samples: Mapping[str, Json], generated: GeneratedSamples) -> list[TokenSequence]:
    """Return the generated sequences, those that are alike and whose question and image are alike as well, once.

    A model that decodes greedily answers a prompt that stands there 16 times 16 times alike: that is no collapse.
    """
    kept: dict[tuple[object, ...], TokenSequence] = {}
    for row, sequence in zip(generated.samples, generated.sequences, strict=True):
        asked = sample_row(samples, row)
        image = asked.get("image")
        shown = (str(image.get("shape")), image.get("pixels")) if isinstance(image, Mapping) else ()
        prompt = (str(asked["question"]), *shown) if "question" in asked else (row,)
        kept.setdefault((*prompt, sequence.content, sequence.has_ended), sequence)
    return list(kept.values())


def reason_of(rules: Mapping[str, bool], target_rules: Mapping[str, bool], verdict: str) -> str:
    """Return ``none``, or the rules behind the verdict joined by ``+`` in the user's order.

    ``target_relative`` leaves out a rule that is true on the targets of the same prompts as well. Where every sample is
    empty that is the whole reason: the other rules speak of tokens.
    """
    is_relative = verdict == "target_relative"
    if rules[NO_TOKENS_GENERATED]:
        return "none" if is_relative and target_rules[NO_TOKENS_GENERATED] else NO_TOKENS_GENERATED
    standing = [name for name in COLLAPSE_RULES if rules[name] and not (is_relative and target_rules[name])]
    return "+".join(standing) or "none"


def never_ends(targets: Sequence[TokenSequence], outputs: Sequence[TokenSequence]) -> bool:
    """Whether no output ends though every target does: noise of an untrained model, which is not collapsed nor well."""
    ends = [sequence.has_ended for sequence in targets]
    return bool(ends) and all(ends) and not any(sequence.has_ended for sequence in outputs)


class UserRules:
    """The rules at each due generation, armed by the first healthy one of a stage, said once per episode.

    What an untrained model says arms nothing ("an untrained model is not a collapsed one"): from noise it comes to one
    answer for all prompts first, and to several later. Another stage (``mark_stage``) is armed anew.
    """

    name = "user_rules"

    def __init__(self) -> None:
        self._history: list[_Arming] = []  # one entry a change

    def observe(self, observation: Observation) -> Verdict:
        """Judge the samples of a step that is due; a step without one sample has no verdict."""
        settings, generated = observation.settings, observation.generated
        if observation.stage:
            self._note(_Arming(step=observation.step, since=observation.step))
        is_due = settings.is_due(settings.collapse_detection_interval, observation.step)
        if not is_due or generated is None or not generated.sequences:
            return Verdict()
        context = observation.context
        targets = target_sequences(context.samples, generated.samples, context.eos_id)
        counts, own = SequenceCounts.of(generated.sequences), SequenceCounts.of(targets)
        rules, on_targets = rules_of(counts, settings), rules_of(own, settings)
        once = rules_of(SequenceCounts.of(answers_once(context.samples, generated)), settings)
        doubted = doubted_rules(targets, generated.sequences, own, counts, settings)
        excused = {name: on_targets[name] or name in doubted or not once[name] for name in rules}
        reason = reason_of(rules, excused, settings.collapse_verdict)
        is_collapsed = reason != "none"
        # What a doubt about few targets excuses is no collapse; that the model is well it does not show either.
        is_doubtful = any(once[name] and not on_targets[name] for name in COLLAPSE_RULES)
        says_nothing = is_doubtful or never_ends(targets, generated.sequences)
        arms_nothing = settings.collapse_verdict == "target_relative" and says_nothing
        is_loud = self._advance(
            observation.step,
            is_collapsed=is_collapsed,
            is_healthy=not is_collapsed and not arms_nothing,
            deadline=settings.collapse_deadline,
        )
        values = _values(counts, rules, reason, context.text)
        if context.eos_id is None:
            values.values.pop("collapse/eos_ratio", None)
        return Verdict(values=values.values, findings=(_finding(reason, counts, context.text),) if is_loud else ())

    def _advance(self, step: int, *, is_collapsed: bool, is_healthy: bool, deadline: int) -> bool:
        """Take a verdict in; returns whether it is to be said now."""
        last = self._history[-1] if self._history else _Arming()
        is_loud = is_collapsed and not last.is_said and (last.is_armed or step >= last.since + deadline)
        self._note(
            _Arming(
                step=step,
                is_armed=last.is_armed or is_healthy,
                is_said=is_collapsed and (last.is_said or is_loud),
                since=last.since,
            )
        )
        return is_loud

    def _note(self, arming: _Arming) -> None:
        last = self._history[-1] if self._history else _Arming()
        if replace(arming, step=last.step) != last:
            self._history = [*self._history, arming][-MAX_EPISODES:]

    def begin(self, attempt: int, step: int) -> None:  # noqa: ARG002  (the step says it all)
        """Return to the armed state before ``step``."""
        self._history = [entry for entry in self._history if entry.step < step]

    def state(self) -> Json:
        """Return the armed state and its changes."""
        return {"history": [[entry.step, entry.is_armed, entry.is_said, entry.since] for entry in self._history]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state; raises KeyError, TypeError or ValueError where it is none."""
        self._history = [
            _Arming(step=int(step), is_armed=bool(armed), is_said=bool(said), since=int(since[0]) if since else 0)
            for step, armed, said, *since in state["history"]
        ]


def _values(counts: SequenceCounts, rules: Mapping[str, bool], reason: str, text: TokenText) -> Measurement:
    found = Measurement()
    found.put("collapse/is_collapsed", int(reason != "none"))
    found.values["collapse/collapse_reason"] = reason
    found.put("collapse/reason_code", sum(REASON_BITS.get(name, 0) for name in reason.split("+")))
    if counts.common is not None:
        found.values["collapse/most_common_token_text"] = text.token(counts.common[0])
        found.put("collapse/most_common_token_id", counts.common[0])
        found.put("collapse/most_common_ratio", counts.common_ratio)
    found.put("collapse/unique_tokens", counts.unique_tokens)
    found.put_ratio("collapse/token_diversity", counts.unique_tokens, counts.num_content)
    found.put("collapse/eos_ratio", counts.eos_ratio)
    found.put("collapse/total_tokens", counts.num_content)
    found.put("collapse/unique_sequences", counts.num_distinct)
    for name, is_true in rules.items():
        found.put(f"collapse/rule/{name}", int(is_true))
    return found


def _finding(reason: str, counts: SequenceCounts, text: TokenText) -> Finding:
    detail = f"{counts.num_sequences} samples, {counts.num_content} content tokens, {counts.unique_tokens} distinct"
    if counts.common is not None and counts.common_ratio is not None:
        detail += f"; most common: {text.token(counts.common[0])!r} with {counts.common_ratio:.0%}"
    return Finding(code="collapse", title="Model collapse", line=COLLAPSE_LINE.format(reason=reason), detail=detail)
