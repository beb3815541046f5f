"""Every step's own signals: what tells a collapse from a healthy model without generating (docs/detection.md).

One ``Signals`` a step and rank, of a bounded size whatever the batch: at most ``signal_rows_per_step`` labelled rows
over all ranks and micro-batches, counts that are exact over all positions, and a few numbers of the model's insides. A
``Probe`` comes on its own interval.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sidestep.protocol.message_base import (
    Float16Array,
    Float32Array,
    Float64Array,
    Int32Array,
    Int64Array,
    Kind,
    Lane,
    Message,
    Uint8Array,
    UInt16Array,
    empty,
)

PAIRS_ALIKE = ("pairs_alike_before", "pairs_alike_two_before", "pairs_alike_three_before")
"""Of ``SIGNAL_COUNTS``, what is counted of the ids before two answers, from the nearest one on."""
PROMPT_COUNTS = ("answers_beside_prompts", "prompt_ends", "prompt_ends_labelled")
"""Of ``SIGNAL_COUNTS``, what is counted beside the end of the samples' prompts, by the ranks that have samples."""
SIGNAL_COUNTS = (
    "positions",
    "padding",
    "compared",
    "labelled",
    "labels_equal_ids",
    "labels_equal_next_ids",
    "labels_masked",
    "answers",
    "answers_with_eos",
    "batches",
    "batches_without_labels",
    "rows",
    "rows_without_labels",
    "rows_begun_twice",
    "answer_pairs",
    *PAIRS_ALIKE,
    *PROMPT_COUNTS,
)
"""What ``Signals.counts`` holds, in this order; a later minor version may append.

``positions``: all of the batch, padding included. ``padding``: those that the attention mask, else the padding id,
says are not real; -1 where neither tells. ``compared``: labelled positions whose own and whose next input id are known.
``labels_equal_ids``: of these, where the target is the input id of the same position. ``labels_equal_next_ids``: where
it is that of the next one, which is what a causal model is to learn. ``labels_masked``: labelled positions whose target
the attention mask says is padding. ``answers``: runs of labelled positions. ``answers_with_eos``: those with an EOS.
``rows``: rows of the batch with a real position. ``rows_without_labels``: of these, without a labelled one.
``rows_begun_twice``: of these, whose first two real ids are the same and the third is another; -1: no ids.
``answer_pairs``: answers that follow another one of the batch, both with three ids or more before their first target in
their rows; -1: no ids. ``pairs_alike_before``: of these, where the id right before the first target is the same for
both; ``pairs_alike_two_before`` and ``_three_before``: where the one before that is, and the one before that.
``answers_beside_prompts``: answers of batches whose ids were compared with the prompts that the rank generates from;
-1: it has none, or they end in nothing that is alike in all. ``prompt_ends``: places of these batches where the ids are
what all those prompts end with. ``prompt_ends_labelled``: of these, with a label for the id that follows.
"""

GROUP_SETTINGS = ("beta1", "beta2", "eps", "weight_decay")
"""What ``Signals.group_settings`` holds of a parameter group. ``beta1``: the momentum of optimizers without betas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals(Message):
    """What one rank saw of one step; rows are labelled positions, all of them or a sample of whole answers."""

    kind = Kind.SIGNALS
    lane = Lane.STATISTICS

    step: int
    counts: Int64Array
    """``SIGNAL_COUNTS`` over all positions of the step [len(SIGNAL_COUNTS)]; -1: not known."""
    labelled: int = 0
    """Labelled positions of the step that had logits: what the rows stand for."""
    sampled: bool = False
    """True where the rows are a sample of them."""
    vocabulary: int = 0
    """Width of the logits; 0: there were none."""
    targets: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Target id of each row [n]."""
    predictions: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Most probable id of each row, the smallest among equals [n]."""
    losses: Float16Array = field(default_factory=lambda: empty(np.float16))
    """Loss of each row in nats; inf over 65,504, NaN stays NaN [n]."""
    entropies: Float16Array = field(default_factory=lambda: empty(np.float16))
    """Entropy of the prediction of each row in nats [n]."""
    eos_probabilities: Float16Array = field(default_factory=lambda: empty(np.float16))
    """Probability of EOS at each row [n], or empty without an EOS."""
    places: Uint8Array = field(default_factory=lambda: empty(np.uint8))
    """Place of each row within its answer, counted from 0, 255 from there on [n]."""
    answers: UInt16Array = field(default_factory=lambda: empty(np.uint16))
    """Which answer of the step (on this rank) each row belongs to, modulo 65,536; ascending [n]."""
    top_probability: float = -1.0
    """Mean probability of the most probable id, over the rows; -1: no rows."""
    mean_ids: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Ids with the highest mean probability over the rows, highest first [k <= 64]."""
    mean_probabilities: Float32Array = field(default_factory=lambda: empty(np.float32))
    """Those mean probabilities [k]."""
    trainer_losses: Float32Array = field(default_factory=lambda: empty(np.float32))
    """The trainer's own number for each micro-batch that had one [m]."""
    sample_hashes: Int64Array = field(default_factory=lambda: empty(np.int64))
    """Hash of ids and labels of each row of the batch, at most ``MAX_SIGNAL_HASHES`` [s]."""
    image_hashes: Int64Array = field(default_factory=lambda: empty(np.int64))
    """Hash of each image, at most ``MAX_SIGNAL_HASHES`` [i]."""
    image_deviations: Float32Array = field(default_factory=lambda: empty(np.float32))
    """Standard deviation of each of those images' pixels [i], or empty where it is not known."""
    projector_rms: float = -1.0
    """Root mean square of what the projector gave, the lowest over the micro-batches; -1: not seen."""
    projector_spread: float = -1.0
    """Root mean square over features of the deviation across images, lowest over micro-batches; -1: not seen."""
    gradient_norm: Float32Array = field(default_factory=lambda: empty(np.float32))
    """Norm of the whole gradient before clipping [1], or empty where it was neither told nor taken."""
    module_norms: Float32Array = field(default_factory=lambda: empty(np.float32))
    """Norm of each module's gradient, in the order of the table ``parameters`` [modules], or empty; -1: it had none."""
    heartbeat: Float32Array = field(default_factory=lambda: empty(np.float32))
    """The same few weights at every step, after the optimizer's step [h], or empty."""
    heartbeat_digest: int = 0
    """Which weights these are: it changes when they are others."""
    rates: Float64Array = field(default_factory=lambda: empty(np.float64))
    """Learning rate of each parameter group that the step was taken with [groups], or empty where it is on a device."""
    step_seconds: float = -1.0
    """Wall time from the end of the step before to the end of this one; -1: not known."""
    wait_seconds: float = 0.0
    """Of it, what the hooks waited for on purpose (generation, probes)."""
    signal_seconds: float = 0.0
    """Wall time that the training thread spent on signals."""
    device_seconds: float = -1.0
    """Device time of an earlier step's signals, by events; -1: none, or not measured."""
    rows_share: float = 1.0
    """Share of the rows' budget that was in use: below 1 where it was thinned to stay within ``overhead_budget``."""
    norm_shares: int = 0
    """Ranks over which the squares of ``module_norms`` add up to those of the whole; 0: they are the whole's."""
    norms_clipped: bool = False
    """True where ``module_norms`` were taken after clipping: only their sizes relative to each other are right."""
    forward_seconds: float = -1.0
    """Wall time on the host from the end of the step before, waits left out, to the end of this step's last forward:
    what a rank took before it had to wait for others' backward; -1: not known."""
    image_means: Float32Array = field(default_factory=lambda: empty(np.float32))
    """Mean of the pixels of each of the hashed images [i], or empty where it is not known."""
    weight_norms: Float32Array = field(default_factory=lambda: empty(np.float32))
    """Norm of each module's trainable weights after the step, as ``module_norms`` [modules], or empty; -1: none."""
    heartbeat_ungrouped: int = 0
    """How many of the weights in ``heartbeat``, the last ones, are of parameters that the optimizer has in no group."""
    optimizer_steps: Float64Array = field(default_factory=lambda: empty(np.float64))
    """Updates that the optimizer's own state counts, for the first parameter of each group that has one [groups];
    -1: none. Empty where no group has one on the host."""
    group_settings: Float32Array = field(default_factory=lambda: empty(np.float32))
    """``GROUP_SETTINGS`` of each parameter group, one group after another [4 * groups]; NaN: it has none, or on a
    device. Empty without an optimizer."""
    gradients_lost: int = 0
    """Micro-batches of the step, after its first one, at which no parameter had a gradient any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Message):
    """The loss of one micro-batch against that of the same one with something moved: images, or later answer tokens.

    What the images are worth, and whether a token's prediction depends on those that come after it.
    """

    kind = Kind.PROBE
    lane = Lane.STATISTICS

    step: int
    loss: float
    """Mean loss over the labelled positions of samples with images, in nats, without gradient; NaN: not probed."""
    rolled_loss: float
    """The same with each image in the place of another."""
    labelled: int
    """Labelled positions that both are means over."""
    images: int
    """Images that were moved."""
    seconds: float = 0.0
    """Wall time that the trainer waited for it."""
    future_rows: int = 0
    """Labelled positions behind which all answer tokens were replaced by others; 0: not probed."""
    future_change: float = 0.0
    """Mean absolute change, in nats, of the loss at these positions: 0 where a position sees nothing that follows."""
    apart_rows: int = 0
    """Rows that stayed as they were while others were changed; 0: not probed."""
    apart_change: float = 0.0
    """Mean absolute change of their loss, in nats: 0 where no row of a batch sees another."""
    padding_rows: int = 0
    """Rows of which the ids at padding were replaced; 0: not probed."""
    padding_change: float = 0.0
    """Mean absolute change of their loss, in nats: 0 where nothing sees padding."""
    image_rows: int = 0
    """Rows in which another image stood in the place of theirs; 0: not probed."""
    image_change: float = 0.0
    """Largest absolute change of their loss, in nats: exactly 0 where images do not reach the answers."""
    last_image_rows: int = 0
    """Rows of several images whose last one alone was replaced, and that have an answer behind it; 0: not probed."""
    last_image_change: float = 0.0
    """Median over these rows of the largest change of a loss behind it, in nats: 0 where most are not reached."""
    misplaced_rows: int = 0
    """Rows whose last image was replaced, and that have an answer before it; 0: not probed."""
    misplaced_change: float = 0.0
    """Mean absolute change of the loss before it, in nats: 0 where each image stands at its own place."""
