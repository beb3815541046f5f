"""What each detector is about: how severe it is, what it belongs to, and how people are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class Severity(IntEnum):
    """How much an incident matters."""

    INFO = 0
    """A shift: perhaps on purpose."""
    WARNING = 1
    """Data, or something that may become a failure."""
    CRITICAL = 2
    """The model, or labels that spoil it."""

    @property
    def level(self) -> str:
        """The word that notices and alerts use."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorKind:
    """One detector, in words."""

    name: str
    severity: Severity
    nature: str
    """``exact`` (no reference), ``self`` (against its own past), ``generation`` or ``shift``."""
    is_collapse: bool
    """True where what it finds is that the model says one thing, or nothing it has learned."""
    title: str

    @property
    def is_exact(self) -> bool:
        """Whether an announced stage changes nothing for it."""
        return self.nature == "exact"


_ROWS: Final = """
no_labels|critical|exact||a batch has nothing to learn from
label_masked_pos|critical|exact||padding is trained on
pad_labelled|critical|exact||the padding id is among the targets
image_tokens_labelled|critical|exact||image placeholders are among the targets
label_leak|critical|exact||the targets stand in the inputs
label_alignment|critical|exact||the targets are not the next tokens
rows_mixed|critical|exact||rows of a batch see each other
future_visible|critical|exact||predictions see the tokens that follow
image_misplaced|critical|exact||images stand in the places of others
padding_visible|critical|exact||padding is read
image_unreached|critical|exact||images do not reach the answers
no_stop_token|critical|exact||answers never end
dup_batch|critical|exact||the same batch over and over
dup_ranks|critical|exact||ranks see the same samples
dup_in_batch|critical|exact||a batch repeats its samples
image_constant|critical|exact||the images are all alike or blank
image_embed_zero|critical|exact||the projector gives zeros
image_embed_constant|critical|exact||the projector gives the same for every image
rank_desync|critical|exact||ranks hold different weights
lr_zero|critical|exact||the learning rate is 0
updates_skipped|critical|exact||optimizer steps are skipped
no_gradient|critical|exact||the gradient is 0
module_dead|critical|exact||a module gets no gradient
no_update|critical|exact||the weights do not move
optimizer_reset|critical|exact||the optimizer has lost its state
not_in_optimizer|critical|exact||weights that are to be trained are in no optimizer
gradients_lost|critical|exact||gradients are thrown away between micro-batches
nonfinite|critical|exact||numbers that are none
init_loss|critical|exact||the model starts worse than guessing
worse_than_uniform|critical|self||the model is worse than guessing
nothing_learned|warning|exact||the loss does not fall from its start
uniform_predictions|critical|exact|collapse|the model guesses evenly
single_answer|critical|self|collapse|the model answers one token to everything
mass_excess|critical|self|collapse|one token takes the probability of others
copying|critical|self|collapse|the model repeats the token before
mass_deficit|critical|self|collapse|the model has forgotten a token
back_to_prior|critical|self|collapse|the model fell back to counting
worse_than_prior|critical|self||the model is worse than counting
cal_up|critical|self||the same targets cost more
confidence_gap|critical|self||the model is surer than it is right
rank_outlier|critical|self||one rank is worse than the others
loss_cusum|critical|self||the loss rises
loss_regress|critical|self||the loss stays above its best
worse_than_start|critical|self||the model gets worse than it began
image_lost|critical|self||images are not looked at any more
gen_repetition|critical|generation|collapse|generated answers loop
user_rules|critical|generation|collapse|the generated answers are collapsed
weights_jump|critical|self||weights were changed by something else than the optimizer
weights_frozen|warning|self||weights do not move any more
updates_rounded|warning|exact||updates are rounded away
loss_differs|warning|self||the loss that is trained on has become another
underconfident|warning|exact||the model is far less sure than it is right
lr_spent|warning|exact||the schedule has ended long before the training
optimizer_settings|warning|exact||the optimizer's settings cannot be meant
settings_changed|warning|self||the optimizer's settings have changed
rows_without_labels|warning|exact||samples have nothing to learn from
labels_late|warning|exact||the first tokens of answers have no label
begun_twice|warning|exact||samples begin twice
template_differs|warning|exact||answers are trained in other places than they are generated
images_missing|warning|shift||no images come in
image_scale|warning|shift||the pixels are on another scale
image_unused|warning|self||images are not looked at
never_beyond_prior|warning|self||nothing is learned beyond counting
loss_spike|warning|self||the loss spikes
grad_spike|warning|self||the gradient spikes
grad_vanish|warning|self||the gradient vanishes
grad_fall|warning|self||the gradient has become smaller, and the loss has not
modules_spike|warning|self||the gradients of several modules spike at once
module_spike|warning|self||a module's gradient spikes
gen_vs_target|warning|generation||generated answers favour one token
gen_length|warning|generation||generated answers have other lengths
target_single|warning|shift||the training data have one answer only
answers_truncated|warning|shift||answers are cut off
targets_missing|warning|shift||targets that used to come are gone
batch_shrunk|warning|shift||batches have shrunk
data_rewound|warning|self||batches of before come again in the same order
data_repeats|warning|shift||few samples come again and again
cal_down|warning|shift||the loss falls all at once
target_shift|info|shift||the targets are others
length_shift|info|shift||the answers' lengths are others
"""


def _kind(line: str) -> DetectorKind:
    name, severity, nature, collapse, title = line.split("|")
    return DetectorKind(
        name=name, severity=Severity[severity.upper()], nature=nature, is_collapse=collapse == "collapse", title=title
    )


KINDS: Final[Mapping[str, DetectorKind]] = {kind.name: kind for kind in map(_kind, _ROWS.strip().splitlines())}
"""Name to kind; of several that speak at one step the first of the most severe ones names the incident."""


def kind_of(name: str) -> DetectorKind:
    """Return a detector's kind; one from outside (``plugins.py``) is a warning of its own past until it says more."""
    known = KINDS.get(name)
    if known is not None:
        return known
    return DetectorKind(name=name, severity=Severity.WARNING, nature="self", is_collapse=False, title=name)
