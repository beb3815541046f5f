"""The table of likely causes: from the set of detectors that spoke, and facts of the first step, to a cause.

The order is the order of trust: an exact check (``exact_causes.py``) before the data, the data before a module, a
module before the optimisation. The first row whose conditions hold is the cause.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Final

from sidestep.worker.cause import Cause, cause
from sidestep.worker.exact_causes import EXACT_CAUSES

_RISEN: Final = (
    "cal_up loss_cusum loss_spike confidence_gap worse_than_uniform worse_than_prior back_to_prior mass_excess "
    "mass_deficit user_rules"
)
"""Detectors that speak where the loss rose; what went with its first step tells why."""


def _forward_changed(detectors: str) -> Cause:
    """Return the row for these detectors; it stands in the table more than once, before what they also may mean."""
    return cause(
        "forward_changed",
        detectors,
        "the model says something else with the weights that it had: dropout, a mask, a buffer or a scale within it "
        "has changed, or what its images show",
        "run the named batch through a checkpoint from before, in training and in evaluation mode; look at its images",
        facts="abrupt outputs_changed weights_steady",
    )


CAUSES: Final[tuple[Cause, ...]] = (
    *EXACT_CAUSES,
    cause(
        "data_collapsed",
        "target_single",
        "the training data have become one answer: all targets are the same token",
        "look at the data from the first step named on: a filter, a mapping of answers, a sort by answer",
    ),
    cause(
        "rank_broken",
        "rank_outlier",
        "one rank has other data, or computes wrongly",
        "compare the named rank's samples; move it to another device",
    ),
    cause(
        "weights_damaged",
        "weights_jump",
        "weights were changed by something else than the optimizer: overwritten, loaded, frozen in part, or decayed",
        "go back to a checkpoint before the first step named; look at what was loaded, resized or frozen there",
    ),
    cause(
        "loss_changed",
        "loss_differs",
        "the loss has become another: a temperature, a weight, smoothing, a reduction or an auxiliary term",
        "compare the trainer's loss with the mean cross-entropy of the same batch",
    ),
    _forward_changed("underconfident"),
    cause(
        "too_smooth",
        "underconfident",
        "the targets are smoothed far too much, or the loss bounds or scales the logits",
        "look at label smoothing, temperatures and soft targets: the share that stays is 1 minus the smoothing",
    ),
    cause(
        "rate_too_high",
        "worse_than_start",
        "the learning rate is too high for the weights that it began with, or the data are not theirs",
        "begin again from these weights with a lower rate or a longer warm-up; decode the first batches",
    ),
    cause(
        "rate_too_high",
        "grad_spike modules_spike module_spike cal_up loss_cusum loss_regress loss_spike confidence_gap mass_excess "
        "back_to_prior worse_than_prior worse_than_uniform uniform_predictions single_answer mass_deficit "
        "copying",
        "the learning rate is too high: it was raised before",
        "go back to a checkpoint before the first step named; lower the rate or lengthen the warm-up",
        facts="rate_raised",
    ),
    cause(
        "leak",
        "cal_down",
        "the answer has come into the prompt, or the task has become trivial",
        "decode the prompts of the named batch: the answer must not stand in them",
    ),
    cause(
        "data_missing",
        "targets_missing",
        "a part of the data does not come any more: a shard, a task or a language is lost, or a filter drops answers",
        "compare the answers before and after the first step named; announce planned changes with mark_stage(name)",
    ),
    cause(
        "gradient_lost",
        "grad_fall",
        "a part of the gradient is lost: micro-batches that do not count, a loss divided twice, weights that are "
        "frozen or cut off",
        "compare the gradient's norm of one micro-batch with that of the step; look at zero_grad, at accumulation and "
        "at requires_grad",
    ),
    cause(
        "data_changed",
        "target_shift length_shift batch_shrunk",
        "the data are others from the first step named on",
        "nothing, if this was planned: announce it with mark_stage(name)",
    ),
    cause(
        "images_lost",
        "image_lost image_unused",
        "the model does not use the images: shuffled against their questions, or cut off",
        "check that each image still belongs to its question; look at the projector's gradient",
    ),
    cause(
        "labels_or_inputs_wrong",
        "cal_up loss_cusum loss_spike loss_regress confidence_gap mass_excess mass_deficit worse_than_uniform "
        "worse_than_prior gen_repetition",
        "targets or inputs are wrong from the first step named on: the targets themselves are others than they were",
        "decode the named batch: do question, image and answer belong together, and is the answer one?",
        facts="targets_changed",
    ),
    cause(
        "optimisation",
        _RISEN,
        "the updates are others than they were: gradients that add up, are clipped away, scaled or lost",
        "look at zero_grad, at accumulation, clipping and the GradScaler from the first step named on",
        facts="updates_changed",
    ),
    cause(
        "inputs_changed",
        _RISEN,
        "prompts or images are others than they were: a template, a tokenizer, an image processor",
        "decode the named batch and look at its images, as the model gets them",
        facts="abrupt inputs_changed",
    ),
    cause(
        "labels_or_inputs_wrong",
        _RISEN,
        "targets or inputs are wrong from the first step named on: the model was as sure as before (noisy "
        "or shuffled labels, images of other samples)",
        "decode the named batch: do question, image and answer belong together?",
        facts="abrupt outputs_unchanged",
    ),
    cause(
        "labels_or_inputs_wrong",
        _RISEN,
        "targets or inputs of a part of the data are wrong from the first step named on: some batches cost as much as "
        "before, and the model was as sure",
        "decode the worst samples of the named batch: do question, image and answer belong together, and which source "
        "do they come from?",
        facts="intermittent outputs_unchanged",
    ),
    _forward_changed(_RISEN),
    cause(
        "weights_damaged",
        _RISEN,
        "the model itself changed: an update that was too large, an optimizer state that was lost, weights "
        "that were overwritten",
        "go back to a checkpoint before the first step named; lower the rate; look at what was loaded or changed there",
        facts="abrupt outputs_changed",
    ),
    cause(
        "optimisation",
        "modules_spike",
        "the gradients of several modules jump at the same step, which is no module's own: noise that is added, a "
        "scale or a reduction that went wrong, or updates that are too large",
        "look at what is done to gradients between backward and the optimizer's step: scaling, noise, the reduction "
        "over ranks, clipping; then at the rate",
    ),
    cause(
        "module_broken",
        "module_spike",
        "one module's gradient explodes",
        "look at the named module: its inputs, its scale, its rate",
    ),
    cause(
        "optimisation",
        "mass_excess single_answer copying mass_deficit back_to_prior uniform_predictions gen_repetition "
        "user_rules confidence_gap cal_up loss_cusum loss_regress worse_than_prior worse_than_uniform "
        "grad_spike loss_spike",
        "the optimisation went wrong: the rate, the batch size or the mix of data does not hold",
        "go back to a checkpoint before the first step named; lower the rate; look at what the data have in"
        " common there",
    ),
    cause(
        "not_learning",
        "never_beyond_prior grad_vanish nothing_learned",
        "nothing is learned: a rate that is far too low, frozen or cut-off weights",
        "overfit one batch first; look at the rate and at which weights are trained",
    ),
    cause(
        "generation",
        "gen_vs_target gen_length",
        "generated answers are unlike the targets, though the training loss is not: the prompt or its template differs",
        "compare the prompt that is generated from with the one that is trained on",
    ),
)
"""The table, in the order of trust."""

UNKNOWN: Final = Cause(
    name="unknown",
    any_of=frozenset(),
    facts=frozenset(),
    text="not known",
    advice="look at the samples and at what changed before the first step named",
)


def likely_cause(detectors: AbstractSet[str], facts: AbstractSet[str]) -> Cause:
    """Return the first row that one of these detectors and all of its facts speak for."""
    return next((each for each in CAUSES if each.any_of & detectors and each.facts <= facts), UNKNOWN)


def cause_named(name: str) -> Cause:
    """Return a cause by its name; the first of several rows."""
    return next((each for each in CAUSES if each.name == name), UNKNOWN)
