"""Every detector's rule, by name (reasons in ``rules.py``); ``--set detectors.NAME.FIELD=VALUE`` changes one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, get_type_hints

from sidestep.worker.detectors.data_rules import (
    BegunTwice,
    EmptyRows,
    LateLabels,
    MissingTargets,
    Shift,
    SingleAnswer,
    TemplateDiffers,
)
from sidestep.worker.detectors.rules import (
    AgainstStart,
    Agreement,
    Alignment,
    Composition,
    Cumulative,
    Drop,
    Fallen,
    Gap,
    Generated,
    GeneratedLength,
    Limit,
    Mass,
    Missing,
    ModuleShare,
    NothingLearned,
    Prior,
    PriorGain,
    Probes,
    RankSum,
    Regress,
    Repeats,
    Rule,
    Scale,
    Spike,
    Start,
    StopToken,
    Unsure,
)
from sidestep.worker.detectors.update_rules import Changed, Frozen, Jump, Misset, Reset, Rounded, Spent, Stuck

PREFIX: Final = "detectors."


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSettings:
    """One rule a detector; the field's name is the detector's, the incident's and the option's."""

    # exact: no warm-up, no reference
    nonfinite: Rule = field(default_factory=Rule)
    no_labels: Rule = field(default_factory=Rule)
    label_masked_pos: Limit = field(default_factory=Limit)
    pad_labelled: Limit = field(default_factory=lambda: Limit(hits=2, window=3, threshold=0.02))
    image_tokens_labelled: Limit = field(default_factory=lambda: Limit(hits=2, window=3, threshold=0.0))
    label_alignment: Alignment = field(default_factory=Alignment)
    label_leak: Alignment = field(default_factory=Alignment)
    rows_mixed: Limit = field(default_factory=lambda: Limit(threshold=0.0002, rearm=2))  # nats; rows apart: 0
    future_visible: Limit = field(default_factory=lambda: Limit(threshold=0.002, rearm=2))  # nats; causal: 0
    image_misplaced: Limit = field(default_factory=lambda: Limit(threshold=0.0002, rearm=2))  # nats; sound: 0
    padding_visible: Limit = field(default_factory=lambda: Limit(threshold=0.0002, rearm=2))  # nats; masked: 0
    image_unreached: Rule = field(default_factory=lambda: Rule(rearm=2))
    no_stop_token: StopToken = field(default_factory=StopToken)
    dup_batch: Repeats = field(default_factory=lambda: Repeats(hits=3, window=3))
    data_rewound: Limit = field(default_factory=lambda: Limit(threshold=3.0))  # batches in a row
    dup_in_batch: Limit = field(default_factory=lambda: Limit(hits=3, window=4, threshold=0.45))  # R-Drop: each twice
    dup_ranks: Rule = field(default_factory=lambda: Rule(hits=3, window=4))
    image_constant: Limit = field(default_factory=lambda: Limit(hits=3, window=4, threshold=0.15))  # 6 questions each
    image_embed_zero: Limit = field(default_factory=lambda: Limit(hits=3, window=4, threshold=1e-6))
    image_embed_constant: Limit = field(default_factory=lambda: Limit(hits=3, window=3, threshold=1e-7))
    no_update: Stuck = field(default_factory=Stuck)
    lr_zero: Stuck = field(default_factory=Stuck)
    updates_skipped: Limit = field(default_factory=lambda: Limit(hits=3, window=3, threshold=0.6))
    no_gradient: Rule = field(default_factory=lambda: Rule(hits=3, window=3))
    module_dead: ModuleShare = field(default_factory=ModuleShare)
    rank_desync: Rule = field(default_factory=lambda: Rule(hits=2, window=2))
    optimizer_reset: Reset = field(default_factory=Reset)
    not_in_optimizer: Rule = field(default_factory=lambda: Rule(hits=10, window=10))
    gradients_lost: Rule = field(default_factory=lambda: Rule(hits=3, window=3))
    optimizer_settings: Misset = field(default_factory=Misset)
    rows_without_labels: EmptyRows = field(default_factory=EmptyRows)
    labels_late: LateLabels = field(default_factory=LateLabels)
    begun_twice: BegunTwice = field(default_factory=BegunTwice)
    template_differs: TemplateDiffers = field(default_factory=TemplateDiffers)
    # absolute
    init_loss: Start = field(default_factory=Start)
    worse_than_uniform: Limit = field(default_factory=lambda: Limit(hits=3, window=5, threshold=0.5))
    nothing_learned: NothingLearned = field(default_factory=NothingLearned)
    uniform_predictions: Limit = field(default_factory=lambda: Limit(hits=4, window=5, threshold=0.1))
    # self-referenced
    mass_excess: Mass = field(default_factory=Mass)
    mass_deficit: Mass = field(
        default_factory=lambda: Mass(hits=4, window=5, armed=20, deadline=0, threshold=0.04, errors=5.0, share=0.6)
    )
    copying: Mass = field(default_factory=lambda: Mass(threshold=0.3))
    cal_up: Composition = field(default_factory=Composition)
    loss_cusum: Cumulative = field(default_factory=lambda: Cumulative(floor=0.05))  # as for cal_up
    loss_regress: Regress = field(default_factory=Regress)
    worse_than_start: AgainstStart = field(default_factory=AgainstStart)
    loss_spike: Spike = field(default_factory=lambda: Spike(hits=4, window=5, rearm=20))
    confidence_gap: Gap = field(default_factory=Gap)
    grad_spike: Spike = field(default_factory=lambda: Spike(hits=5, window=6, threshold=6.0, rise=1.6))
    grad_vanish: Spike = field(default_factory=lambda: Spike(hits=3, window=3, threshold=8.0, rise=6.9))
    module_spike: Spike = field(
        default_factory=lambda: Spike(hits=2, window=3, threshold=8.0, rise=2.3, rearm=10, median_readings=64)
    )
    modules_spike: Limit = field(
        default_factory=lambda: Limit(hits=2, window=3, threshold=2.3, rearm=10)  # log: ten times, with module_spike
    )
    grad_fall: Fallen = field(default_factory=Fallen)
    worse_than_prior: Prior = field(default_factory=lambda: Prior(armed=40, deadline=400))
    back_to_prior: PriorGain = field(default_factory=PriorGain)
    never_beyond_prior: PriorGain = field(
        default_factory=lambda: PriorGain(hits=20, window=20, threshold=0.02, warmup=1_000)
    )
    rank_outlier: RankSum = field(default_factory=RankSum)
    image_unused: Probes = field(default_factory=Probes)
    image_lost: Probes = field(default_factory=lambda: Probes(hits=2, window=2, pooled=1))
    single_answer: SingleAnswer = field(default_factory=SingleAnswer)
    weights_jump: Jump = field(default_factory=Jump)
    weights_frozen: Frozen = field(default_factory=Frozen)
    updates_rounded: Rounded = field(default_factory=Rounded)
    loss_differs: Agreement = field(default_factory=Agreement)
    underconfident: Unsure = field(default_factory=Unsure)
    lr_spent: Spent = field(default_factory=Spent)
    settings_changed: Changed = field(default_factory=Changed)
    # generation against target
    gen_repetition: Generated = field(default_factory=lambda: Generated(threshold=0.3, hits=2, window=2))
    gen_vs_target: Generated = field(default_factory=lambda: Generated(threshold=0.45, hits=2, window=2))
    gen_length: GeneratedLength = field(default_factory=GeneratedLength)
    # data
    target_single: Shift = field(default_factory=lambda: Shift(threshold=0.1, min_rows=128, pooled=32))
    target_shift: Shift = field(default_factory=lambda: Shift(threshold=0.25))
    targets_missing: MissingTargets = field(default_factory=MissingTargets)
    length_shift: Shift = field(default_factory=lambda: Shift(threshold=2.0, hits=5, window=8))
    answers_truncated: Shift = field(default_factory=lambda: Shift(threshold=0.1, pooled=8))
    batch_shrunk: Shift = field(default_factory=lambda: Shift(threshold=0.3, hits=5, window=8, min_rows=4))
    data_repeats: Shift = field(default_factory=lambda: Shift(threshold=0.5, hits=8, window=10, min_rows=4))
    images_missing: Missing = field(default_factory=Missing)
    image_scale: Scale = field(default_factory=Scale)
    cal_down: Drop = field(default_factory=Drop)
    user_rules: Rule = field(default_factory=lambda: Rule(rearm=1, cool_steps=0))

    def rule(self, name: str) -> Rule | None:
        """Return the rule of a detector; None where there is none of this name."""
        found = getattr(self, name, None)
        return found if isinstance(found, Rule) else None


def detector_names() -> tuple[str, ...]:
    """Return the names of all detectors, in the order in which they are asked."""
    return tuple(each.name for each in fields(DetectorSettings))


def apply_assignments(settings: DetectorSettings, assignments: Iterable[str]) -> DetectorSettings:
    """Return ``settings`` with each ``detectors.NAME.FIELD=VALUE`` applied in turn.

    Raises:
        ValueError: an assignment has another form, names nothing that there is, or its value is of another type; the
            text names the option and what is valid.
    """
    for assignment in assignments:
        settings = _assigned(settings, assignment)
    return settings


def _assigned(settings: DetectorSettings, assignment: str) -> DetectorSettings:
    option, equals, text = assignment.partition("=")
    option = option.strip()
    parts = option.removeprefix(PREFIX).split(".")
    if not equals or not option.startswith(PREFIX) or len(parts) != 2:
        raise ValueError(
            f"--set {assignment!r}: write {PREFIX}NAME.FIELD=VALUE, as in {PREFIX}mass_excess.threshold=0.1"
        )
    name, setting = parts
    rule = settings.rule(name)
    if rule is None:
        raise ValueError(f"--set {option}: there is no detector {name!r}; there are {', '.join(detector_names())}")
    kinds = get_type_hints(type(rule))
    if setting not in kinds:
        raise ValueError(f"--set {option}: {name} has no setting {setting!r}; it has {', '.join(kinds)}")
    value = _parsed(option, text.strip(), kinds[setting])
    changed: dict[str, Any] = {setting: value}
    named: dict[str, Any] = {name: replace(rule, **changed)}
    return replace(settings, **named)


_WORDS: Final = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def _parsed(option: str, text: str, kind: Any) -> bool | int | float:
    try:
        if kind is bool:
            return _WORDS[text.lower()]
        value = kind(text)
    except (KeyError, ValueError) as error:
        form = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise ValueError(f"--set {option}: {text!r} is not {form}") from error
    if not 0 <= value < float("inf"):
        raise ValueError(f"--set {option}: {text!r} is not a finite number of at least 0")
    return int(value) if kind is int else float(value)
