"""Rules of what the optimizer does: weights, rates and its own state (``updates.py``, ``weights.py``)."""

from __future__ import annotations

from dataclasses import dataclass

from sidestep.worker.detectors.rules import Limit, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck(Rule):
    """Weights or rates that do not move."""

    hits: int = 5
    window: int = 5
    first_steps: int = 500
    """Readings it takes where nothing moved yet and the rate still rises: a warm-up's first updates can be below a
    weight's precision."""
    least_rate: float = 0.01
    """Share of the highest rate so far below which nothing need move: a schedule that ends near 0 is no failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jump(Limit):
    """Weights that moved further than an optimizer moves them."""

    cool_steps: int = 300
    threshold: float = 10.0
    """Times the usual largest move of a sampled weight (measured: at most 2.9 in 88 of 96 healthy runs, 7.2 in those
    whose images or words have no gradient for most steps; overwritten weights 20 to 107)."""
    beyond: float = 2.0
    """Times the largest of the last moves that it must be as well: an outer optimizer's step comes again and again."""
    threshold_norms: float = 8.0
    """Times the usual largest relative change of a module's norm ..."""
    least_change: float = 0.1
    """... and at least this part of the norm (measured: 4.4 times where modules are unfrozen in stages, 12.9 times but
    7 % where a projector begins to learn late; a flipped bit 975 times, weight decay of 5 10.8 times and 14 %)."""
    warmup: int = 24
    median_readings: int = 64
    warmup_norms: int = 6
    """Readings of norms before they are judged; they come every ``signal_gradient_interval`` steps."""
    median_norms: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen(Limit):
    """Sampled weights that do not move any more while others do."""

    hits: int = 5
    window: int = 5
    threshold: float = 0.3
    """Share of them beyond the usual one: in half precision many stand still at a low rate, and always did."""
    warmup: int = 24
    median_readings: int = 64
    least_rate: float = 0.01
    """Share of the highest rate so far below which nothing need move, as of ``Stuck`` ..."""
    falling_steps: int = 32
    """... where the rate has come there on a schedule that falls at every step: one that leaps down is a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded(Limit):
    """Updates that half precision rounds away."""

    still_steps: int = 64
    """Steps that a weight must have stood still: where updates are rounded up or down by chance, one in sixty of them
    moves a weight, and none is lost ..."""
    threshold: float = 0.9
    """... and share of the sampled weights that have: fine-tuning in bfloat16 alone at a rate of 1e-5 leaves about
    three quarters of weights around 0.02 where they are, and still learns from the rest."""
    least_rate: float = 0.5
    """Share of the highest rate so far below which nothing is said: the end of a schedule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset(Limit):
    """The optimizer's own count of updates."""

    rearm: int = 20
    threshold: float = 0.5
    """Part of the count that there should be after a resume or a gap below which the state is not the old one."""
    least_steps: int = 20
    """Count from which a resume is judged."""
    first_steps: int = 20
    """Readings in a row with a count of 1 at most from which the state is lost at every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent(Limit):
    """A schedule that has ended long before the training."""

    threshold: float = 0.01
    """Part of the highest rate below which a step teaches next to nothing."""
    least_steps: int = 100
    """Steps below it in a row from which it is said ..."""
    share: float = 0.15
    """... if they are this part of all steps so far: a cosine to zero is below it for the last 6.4 % of a run."""
    falling_share: float = 0.6
    """The same where the rate still falls: the fourth power of what is left is below it for a third of a run, an
    exponential down to 1e-4 for half of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misset(Rule):
    """What an optimizer's group is set to."""

    hits: int = 3
    window: int = 3
    most_decay: float = 0.01
    """Rate times weight decay: the part of every weight that a step takes away. Usual ones are below 0.0001; 0.0009
    trains well (measured), and from 0.01 on half of a weight is gone after 69 steps."""
    eps_times: float = 10.0
    """Times the gradient's root mean square from which Adam's eps outweighs it: what is left is a small rate of SGD."""
    eps_readings: int = 20
    """Readings of the gradient's norm in a row that it takes."""
    least_loss: float = 0.05
    """Loss in nats below which a small gradient is nothing but a task that is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed(Limit):
    """A setting against what it was."""

    threshold: float = 0.4
    """Relative change; of a beta also that of its distance to 1, which is what its memory depends on. A schedule that
    takes a step an epoch goes on by less; what another configuration has is mostly a multiple."""
    still_steps: int = 32
    """Steps that it must have stood still: what moves more often is on a schedule."""
    confirm_steps: int = 4
    """Steps that it must stand still after the change as well: a schedule may begin there."""
