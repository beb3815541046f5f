"""What a detector's rule is made of: typed thresholds with their reasons; ``settings.py`` has one rule a detector.

Figures marked *measured* were taken on real trainings of small VQA models (the first 92 of them before there was a lab,
docs/detection.md) and on real logs of language models; the others say what they are taken from. Steps are optimizer
steps, readings are steps at which a detector had what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When readings become an incident's evidence: k of the last m, said once, and when it may be said again."""

    enabled: bool = True
    """False: this detector never speaks."""
    hits: int = 1
    """k: readings beyond the threshold that it takes."""
    window: int = 1
    """m: among this many of the last readings."""
    armed: int = 0
    """Readings within the threshold in a row that there must have been once; 0: it speaks from the first one."""
    deadline: int = 0
    """Readings after which one that was never armed speaks all the same, once; 0: never."""
    rearm: int = 50
    """Clean readings in a row after which it is quiet again (50 to 100 did alike in 92 runs)."""
    cool_steps: int = 200
    """Steps after it spoke in which it does not speak again (no flapping in 92 runs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit(Rule):
    """A rule about one number."""

    threshold: float = 0.0
    """The reading is beyond where its value is over this (or under it, where the detector says so)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start(Limit):
    """The first losses against a uniform guess."""

    threshold: float = 4.5
    """Nats over the logarithm of the vocabulary: logits with a standard deviation of 3. Some known initialisations, as
    blocks that begin at zero, start at 3.6 and are through within six steps (measured; a broken start: 275)."""
    errors: float = 3.0
    """Standard errors over the distinct targets that it must be over as well: of few targets a sound start costs more
    by chance (measured: multiple choice with 4 distinct targets began 1.19 nats over, with an error of 0.37)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingLearned(Limit):
    """An untrained model whose loss does not fall."""

    hits: int = 3
    window: int = 3
    threshold: float = 0.9
    """Part of its first loss that it still has (measured after 40 steps: at most 0.7 in 105 healthy runs that began
    untrained, 0.18 with a warm-up of 270 steps)."""
    untrained: float = 0.7
    """Part of a uniform guess's cost from which the first loss is that of an untrained model ..."""
    least_uniform: float = 4.0
    """... where such a guess costs so many nats at least: of a few classes there may be nothing to learn at first."""
    steady: int = 20
    """Readings since the learning rate last rose above all before."""
    recent: int = 8
    """Losses whose median is judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment(Limit):
    """Targets against inputs."""

    hits: int = 2
    window: int = 3
    threshold: float = 0.95
    """Share of targets that are the next input id below which they are not aligned (measured: 1 step)."""
    learn_readings: int = 5
    """First readings that say what is usual: noise in the inputs lowers the share on purpose."""
    min_targets: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StopToken(Limit):
    """EOS among the labels."""

    hits: int = 3
    window: int = 4
    threshold: float = 0.5
    """Share of answers with EOS below which it is not learned (nanoVLM #197, TRL #734, LlamaFactory #2884)."""
    min_answers: int = 4
    text_share: float = 0.9
    """Labelled share of real positions from which it is plain text, not answers: nothing has to end."""
    most_alike: float = 0.6
    """Share of pairs of answers with the same token before them, below which they are pieces of answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats(Limit):
    """Samples that come again."""

    history: int = 8
    """Earlier batches that a batch is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShare(Limit):
    """One module's part of the gradient."""

    hits: int = 3
    window: int = 3
    rearm: int = 10
    threshold: float = 1e-3
    """Part of its median share below which a module is dead (measured: 2 steps)."""
    never_hits: int = 4
    """Readings it takes where a module never had a gradient, though the table says that it is trainable."""
    median_readings: int = 64
    """Readings whose median is the usual share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement(Limit):
    """The trainer's own loss against the cross-entropy of the same logits and labels."""

    hits: int = 3
    window: int = 4
    threshold: float = 0.2
    """Change of the logarithm of their ratio: an auxiliary loss, smoothing or weights have a ratio of their own ..."""
    drift: float = 3.0
    """Times its change over as many steps before, which is free ..."""
    least: float = 0.02
    """... and of their difference, in nats, from which it is another loss."""
    errors: float = 6.0
    """Standard errors of the own loss that it must be over as well, where its rows are a sample."""
    pooled: int = 8
    """Steps whose means are compared ..."""
    usual_steps: int = 16
    """... with those of this many before them: of a smoothed loss both go down, each at its own pace."""
    steady: float = 0.25
    """Most that the logarithm of the cross-entropy itself may have changed."""
    warmup: int = 40
    """Readings before it judges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsure(Limit):
    """A model that is far less sure than it is right."""

    hits: int = 8
    window: int = 10
    threshold: float = 1.75
    """Nats of entropy above the loss: smoothing of 0.1 makes 0.8 of them with 460 ids, 1.3 with 50,000 (measured from
    step 100 on: at most 0.1 in healthy runs, 0.5 on prose and in a warm-up of 300 steps; smoothing of 0.9: 3.5)."""
    warmup: int = 100
    """Readings before it judges: a model from scratch learns which ids there are before it is sure of any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing(Limit):
    """Steps without an image where there should be some."""

    threshold: float = 30.0
    """Steps in a row: mixtures have text-only batches now and then."""
    share: float = 0.9
    """Share of the steps before, or of the samples that are generated from, that have images."""
    warmup: int = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Limit):
    """Pixels against what they were."""

    hits: int = 4
    window: int = 5
    threshold: float = 2.0
    """Times (or parts) of the usual deviation of an image's pixels, and usual deviations of their mean."""
    warmup: int = 16
    median_readings: int = 64
    highest: float = 20.0
    """Deviation from which pixels look like bytes: normalised ones have about 1 ..."""
    lowest: float = 0.02
    """... and below which they look divided twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cumulative(Rule):
    """A running reference and a cumulative sum over its z-scores (measured: 0 false alarms in 252,117 real steps)."""

    allowance: float = 1.0
    """k: standard deviations a step that are free."""
    threshold: float = 9.9
    """h: the sum from which it speaks: five steps at 3 standard deviations or more, ten at 2."""
    clip: float = 3.0
    """Largest z-score of one step: a failure lasts, an instability passes. At 6, two steps were enough, and a healthy
    run whose loss rose from 0.25 to 1.4 nats for four steps and came back was called failed (measured: 1 in 33)."""
    warmup: int = 60
    """Readings before it judges."""
    rate: float = 0.01
    """Weight of the newest value: 0.02 and more raised 1 to 5 false alarms in 184,576 real steps, 0.01 none."""
    floor: float = 0.02
    """Smallest standard deviation, in nats: noise of a loss of 0.002 is no event."""
    freeze_steps: int = 100
    """Steps that the reference stands still while the sum is over half of its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap(Cumulative):
    """Mean loss minus mean entropy, which is 0 for any model that is as sure as it is right.

    A pretrained model may be too sure of another format at first: armed as ``Mass`` is.
    """

    armed: int = 20
    deadline: int = 500
    threshold: float = 9.9
    """As for the other sums. Measured: healthy runs have medians of -0.11 to 0.00 nats, single steps of -0.35 to
    0.22."""
    own: float = 0.05
    """Most nats of a lasting gap that are taken for the run's own: an aggressive rate is a little too sure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition(Cumulative):
    """The loss against what the same targets usually cost (docs/detection.md)."""

    warmup: int = 120
    floor: float = 0.05
    """Smallest standard deviation, in nats: at 0.02 two hard samples within three steps of nearly memorised tables were
    an alarm (measured: 2 in 6,300 healthy steps; none at 0.05)."""
    token_rate: float = 0.02
    """Weight of one more sighting of a target (measured)."""
    min_sightings: int = 5
    """Sightings from which a target has an expectation of its own."""
    min_rows: int = 16
    """Rows below which a step is not judged."""
    max_ids: int = 2_048
    """Targets with an expectation of their own; rarer ones share one by the size of their id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop(Rule):
    """The loss falls from one step to the next by what no learning explains."""

    hits: int = 2
    window: int = 3
    cool_steps: int = 300
    threshold: float = 0.4
    """Part of its level that the loss lost: learning takes tens of steps for that, a leak one."""
    least: float = 0.2
    """Nats that it lost at least ..."""
    spreads: float = 1.5
    """... and times as far as the lowest step before is below the usual one."""
    recent: int = 3
    """Steps whose median is compared with ..."""
    before: int = 20
    """... the median of this many before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regress(Rule):
    """The loss stands above its best for long."""

    hits: int = 8
    window: int = 10
    threshold: float = 0.15
    """Nats above the best (measured: 0 false alarms on real logs, together with the next two)."""
    share: float = 0.08
    """Part of the best that it must be above it as well."""
    errors: float = 5.0
    """Standard errors of the mean that it must be above it as well."""
    warmup: int = 200
    rate: float = 0.02
    """Weight of the newest loss: a mean over some 50 steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstStart(Limit):
    """The first steps' losses against the very first one, which no update has touched.

    A model that has learned before and gets worse from its first steps on has a rate that is too high for it, or data
    that are not its own; a new one begins near a uniform guess and can only fall (measured: 30 times the rate on a
    pretrained language model, found after 6 and 8 steps instead of 87 and 110; never in 32 healthy runs).
    """

    hits: int = 5
    window: int = 6
    threshold: float = 0.5
    """Nats above the first loss: a rate that warms up anew costs less."""
    share: float = 0.5
    """Part of the first loss that it must be above it as well."""
    errors: float = 5.0
    """Standard errors of the first loss, over its answers: batches are as unlike as the answers in them."""
    readings: int = 200
    """Readings in which it judges: later, data may have become harder on purpose."""
    min_answers: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike(Limit):
    """A single value far from the median of the last."""

    threshold: float = 8.0
    """Robust standard deviations. Of the logarithm of the gradient's norm, healthy runs pass 6 in two of three steps
    (measured: three times in 5,400 steps), and in three of four (once in 30,000: a burst that the clipping met), so
    that takes five of six. Of losses, 351 of 184,576 real steps are over 8 and 0.3 nats, no two of them within three
    steps; small models on skewed data have bursts of three, so that a loss takes four of five."""
    rise: float = 0.3
    """Least rise: nats for a loss; for a gradient, the natural logarithm of the norm."""
    warmup: int = 60
    median_readings: int = 128
    least_loss: float = 0.1
    """Usual loss in nats below which gradients are not judged: one hard sample of a set that is nearly memorised gives
    100 times the gradient, and is no failure (measured: 2, and one more of a run on tables)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mass(Limit):
    """Mean prediction against the targets of the same rows.

    A pretrained model may favour another format for as long as its warm-up lasts: it speaks once the model has been
    within the threshold, which one from scratch is at once (measured), or at the deadline.
    """

    hits: int = 3
    window: int = 4
    armed: int = 8
    deadline: int = 500
    threshold: float = 0.08
    """Measured: healthy runs stay below 0.03 in all tasks and phases; 0.08 raised nothing outside stage switches."""
    min_rows: int = 256
    """Rows that are pooled before it judges ..."""
    min_steps: int = 8
    """... over at least this many steps ..."""
    max_steps: int = 32
    """... and at most this many."""
    errors: float = 4.0
    """Standard errors of the targets' share that it must be over as well: few rows say little."""
    share: float = 0.0
    """Part of the token's share among the targets that it must be over as well."""
    other_loss: float = 3.0
    """Times the threshold, for what rare tokens get and frequent ones lose, where the trainer's loss is another than
    the cross-entropy of its rows (weights by class, smoothing, focus): the best model for that gives them so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior(Rule):
    """The model against a table of how often each target stands at each place."""

    hits: int = 5
    window: int = 8
    threshold: float = 0.05
    """Nats by which the model must be worse than the table (measured)."""
    warmup: int = 120
    """Readings after which the table is one."""
    min_rows: int = 16
    max_ids: int = 2_048
    rate: float = 0.01
    """Weight of the newest step in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorGain(Rule):
    """What the model knows beyond that table, against what it once knew."""

    hits: int = 6
    window: int = 8
    threshold: float = 0.35
    """Share of its usual gain below which it has fallen back."""
    least_gain: float = 0.15
    """Usual gain in nats from which there is something to lose."""
    warmup: int = 120
    rate: float = 0.005
    """Weight of the newest step in the usual gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSum(Cumulative):
    """One rank against the median of all."""

    clip: float = 6.0
    threshold: float = 25.0
    """Measured with 4 ranks: 6 to 14 steps, no false alarm."""
    second: float = 10.0
    """The next rank's sum must be below this: else it is not one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes(Limit):
    """What images are worth, in nats (``Probe``)."""

    rearm: int = 2
    threshold: float = 0.02
    """Measured: unused images stay within 0.03, used ones are over 0.05 by step 349."""
    pooled: int = 4
    """Probes whose mean is judged."""
    warmup: int = 6
    """Probes before it speaks; those before it count among ``lasting`` once ``pooled`` are full (measured: a model
    that never looks is told at its 6th probe instead of its 8th, and no healthy one is)."""
    lasting: int = 3
    """Probes in a row, the newest one by itself included, that must show nothing."""
    first_step: int = 350
    """Step before which nothing is judged: from scratch, images come into use by step 349 (measured)."""
    knowledge: float = 0.1
    """Nats that the model must know beyond counting its targets: one that has learned nothing is not blind by that
    (measured: yes/no questions and 85 % "A", not learned in 900 steps)."""
    had: float = 0.1
    """Gain in nats that there must have been for a loss of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(Limit):
    """Generated answers against the targets of the same prompts."""

    armed: int = 1
    deadline: int = 10
    """Checks: at the default interval of 50 steps this is step 500, as in ``collapse_deadline``."""
    rearm: int = 2
    min_samples: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedLength(Generated):
    """Lengths of generated answers."""

    hits: int = 2
    window: int = 2
    threshold: float = 3.0
    """Median length over or under the targets' by this factor (docs/detection.md)."""
    hit_max: float = 0.5
    """Share of samples, beyond the targets' own, that never end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallen(Limit):
    """The gradient's norm against its own past, while the loss stands."""

    threshold: float = 1.0
    """Fall of the logarithm of the norm's median: at 0.7 two of 123,300 healthy steps, at 0.9 none (measured)."""
    hits: int = 2
    window: int = 3
    recent: int = 12
    """Steps whose median is compared with ..."""
    before: int = 64
    """... the median of this many before them."""
    steady: float = 0.2
    """Most that the logarithm of the loss's median may have changed ..."""
    least_loss: float = 0.1
    """... and the loss, in nats, below which it is not judged."""
    deviations: float = 2.5
    """Robust standard deviations of the norm's logarithm that it must have fallen by as well: where each step is of one
    task, medians of 12 vary by more than one (measured: 1.0 was too few)."""
