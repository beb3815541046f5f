"""The table of likely causes: from the set of detectors that spoke, and facts of the first step, to a cause.

The order is the order of trust: an exact check before the data, the data before a module, a module before the
optimisation. The first row whose conditions hold is the cause.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One row of the table."""

    name: str
    any_of: frozenset[str]
    """One of these detectors must have spoken ..."""
    facts: frozenset[str]
    """... with all of these facts."""
    text: str
    advice: str


def _cause(name: str, detectors: str, text: str, advice: str, facts: str = "") -> Cause:
    return Cause(
        name=name, any_of=frozenset(detectors.split()), facts=frozenset(facts.split()), text=text, advice=advice
    )


_RISEN: Final = (
    "cal_up loss_cusum loss_spike confidence_gap worse_than_uniform worse_than_prior back_to_prior mass_excess "
    "mass_deficit user_rules"
)
"""Detectors that speak where the loss rose; what went with its first step tells why."""

_FORWARD_CHANGED: Final = {
    "name": "forward_changed",
    "text": "the model says something else with the weights that it had: dropout, a mask, a buffer or a scale within "
    "it has changed, or what its images show",
    "advice": "run the named batch through a checkpoint from before, in training and in evaluation mode; look at its "
    "images",
    "facts": "abrupt outputs_changed weights_steady",
}

CAUSES: Final[tuple[Cause, ...]] = (
    _cause(
        "batch_without_labels",
        "no_labels",
        "the chat template, the truncation or ignore_index leaves a batch without a label",
        "look at the collator's output for the named batch; drop or fill samples whose answer was cut away",
    ),
    _cause(
        "mask_inverted",
        "label_masked_pos",
        "the attention mask is inverted or belongs to other rows: all that has a label is padding by it",
        "print input_ids beside attention_mask: 1 is for what is read, 0 for padding",
        facts="all_masked",
    ),
    _cause(
        "padding_labelled",
        "label_masked_pos pad_labelled",
        "labels are not masked at padding",
        "set labels to ignore_index where attention_mask is 0 (mind pad == eos: mask by position, not by id)",
    ),
    _cause(
        "image_tokens_labelled",
        "image_tokens_labelled",
        "labels are not masked at image placeholders",
        "set labels to ignore_index where the input id is the image token",
    ),
    _cause(
        "label_leak",
        "label_leak",
        "labels are not shifted: each position predicts its own input",
        "shift labels by one, once: in the data or in the model's loss",
    ),
    _cause(
        "label_shift",
        "label_alignment",
        "labels are shifted twice, or cut apart from their inputs",
        "compare input_ids[i + 1] with labels[i]; tell the hooks with shifted= which convention holds",
    ),
    _cause(
        "rows_mixed",
        "rows_mixed",
        "rows of a batch are mixed: an axis of rows is taken for one of positions, a mask lets rows see each other, or "
        "images are put into other rows",
        "look at view, reshape, transpose and permute from ids to logits, at the attention mask's shape, and at the "
        "order in which images are put in; a mixture of experts with a limit of tokens may do it by design",
    ),
    _cause(
        "future_visible",
        "future_visible",
        "a causal mask is missing: each position sees the answer that it is to give",
        "look at the attention mask and is_causal that reach the attention kernel, in training mode and with the "
        "batch's padding or packing",
    ),
    _cause(
        "padding_visible",
        "padding_visible",
        "the attention mask is not applied: answers depend on what stands at padding",
        "look at whether the mask reaches the attention kernel, mind left padding; where the model counts positions or "
        "averages over all of them, padding may be read by design",
    ),
    _cause(
        "stop_token_missing",
        "no_stop_token",
        "EOS is not among the labels: another tokenizer's EOS, or masked as padding (pad == eos), or cut off",
        "decode a few labels; append EOS after the answer and keep it out of the padding mask",
    ),
    _cause(
        "answers_cut",
        "answers_truncated",
        "longer samples are truncated before their answer ends",
        "raise the maximum length, or drop what does not fit",
    ),
    _cause(
        "samples_empty",
        "rows_without_labels",
        "many samples have no labelled position: their answer was cut off, or the mask finds no answer in them",
        "decode a few such samples: look at the maximum length, and at the text by which the mask finds the answer",
    ),
    _cause(
        "labels_begin_late",
        "labels_late",
        "labels begin behind the first tokens of the answers: the template is measured in other tokens, or the mask is "
        "off by one",
        "print and decode the ids around the first label of some samples: it must be the answer's first token",
    ),
    _cause(
        "templates_differ",
        "template_differs",
        "training and generation do not share their template, or the answers' first tokens are masked",
        "print a training sample beside Sample.prompt_ids: render both by one apply_chat_template, the prompt with "
        "add_generation_prompt=True, and label the answer from its first token on",
    ),
    _cause(
        "begun_twice",
        "begun_twice",
        "the beginning is added twice: by the chat template, and by the tokenizer once more",
        "tokenize the template's text with add_special_tokens=False, or take the token out of the template",
    ),
    _cause(
        "loader_stuck",
        "dup_batch",
        "the loader hands out the same batch again: an iterator made anew at each step, or a stuck worker",
        "make the iterator once an epoch; look at the sampler's state after a resume",
    ),
    _cause(
        "ranks_share_data",
        "dup_ranks",
        "the data are not split over ranks (or the split is undone by a skip)",
        "pass rank and world size to the sampler; look at .shard()/.skip() of a streaming data set",
    ),
    _cause(
        "data_repeats",
        "dup_in_batch",
        "the sampler draws the same few samples",
        "look at the sampler, the shuffling buffer and the shards that are read",
    ),
    _cause(
        "images_alike",
        "image_constant",
        "images are lost or overwritten before the model: a failed download's stand-in, a wrong index, a blank frame",
        "look at the pixel values of the named batch, as the model gets them",
    ),
    _cause(
        "images_missing",
        "images_missing",
        "images are dropped: the placeholder is no token of the tokenizer, or the key is none of the model's",
        "print a batch's keys and decode its input_ids: is the image's placeholder one id, and are the pixels there?",
    ),
    _cause(
        "pixels_scaled",
        "image_scale",
        "pixels are on another scale: not divided, divided twice, or normalised with other numbers",
        "print minimum, maximum and mean of the pixels as the model gets them; compare the image processor's settings",
    ),
    _cause(
        "data_repeats",
        "data_repeats",
        "the sampler draws the same few samples",
        "look at the sampler, the shuffling buffer and the shards that are read",
    ),
    _cause(
        "data_begun_anew",
        "data_rewound",
        "the data have begun anew: a resume that does not skip what was seen, or epochs that all come in one order",
        "restore the sampler's state with the checkpoint; shuffle, and call set_epoch() at each epoch's begin",
    ),
    _cause(
        "replicas_apart",
        "rank_desync",
        "replicas are not synchronised: a rank skipped a reduction, or a device computes wrongly",
        "restart from the last checkpoint; test the named rank's device",
    ),
    _cause(
        "rate_is_zero",
        "lr_zero",
        "the schedule gives 0: its length is in other units than the steps, or it was not restored",
        "print the schedule's rate over the steps to come",
    ),
    _cause(
        "schedule_spent",
        "lr_spent",
        "the schedule was made for fewer steps: it is stepped too often, or its length is that of one rank or epoch",
        "compare the schedule's length with the optimizer steps to come; step it once an optimizer step",
    ),
    _cause(
        "gradients_thrown_away",
        "gradients_lost",
        "zero_grad is called within the accumulation: of a step's micro-batches only the last ones count",
        "call zero_grad once an optimizer step, before the first micro-batch or after optimizer.step()",
    ),
    _cause(
        "optimizer_lost",
        "optimizer_reset",
        "the optimizer's state was lost: it was made anew, cleared, or not loaded with the checkpoint",
        "load the optimizer's state with the weights; make the optimizer once, outside the loop",
    ),
    _cause(
        "optimizer_misset",
        "optimizer_settings settings_changed",
        "the optimizer's settings are not those that were meant: betas in the wrong order, a decay or eps that is far "
        "too large, or another configuration since the step named",
        "print optimizer.param_groups without their parameters, and compare it with the configuration that was meant; "
        "announce planned changes with mark_stage(name)",
    ),
    _cause(
        "bad_start",
        "init_loss",
        "weights are not initialised, or new rows of the embedding are far too large",
        "look at what from_pretrained reports as newly initialised",
    ),
    _cause(
        "diverged",
        "nonfinite",
        "the learning rate is too high: it was raised before",
        "go back to a checkpoint before the first step named; lower the rate or lengthen the warm-up",
        facts="rate_raised",
    ),
    _cause(
        "diverged",
        "nonfinite",
        "the training diverged: the gradient rose first",
        "go back to a checkpoint before the first step named; lower the rate, clip the gradient, skip the "
        "named batches",
        facts="gradient_up",
    ),
    _cause(
        "numbers_lost",
        "nonfinite",
        "an operation gave NaN or infinity: a division by 0, a log of 0, an overflow in half precision",
        "run the named batch again in float32 with anomaly detection",
    ),
    _cause(
        "steps_skipped",
        "updates_skipped",
        "the gradient overflows at every scale, or its scale is lost",
        "train in bfloat16, or lower the rate; look at the GradScaler's scale",
    ),
    _cause(
        "projector_silent",
        "image_embed_zero image_embed_constant",
        "the projector's output tells nothing of the image: zero or dead weights, or its input is constant",
        "look at the projector's weights and at what the vision encoder gives it",
    ),
    _cause(
        "images_misplaced",
        "image_misplaced",
        "the images of a row are put in at the places of others: in another order, or counted from another row",
        "compare the order of images and of placeholders in a row with several images, as the model gets them",
    ),
    _cause(
        "image_unreached",
        "image_unreached",
        "what the image gives is dropped on its way: no position has the placeholder's id, features are not merged "
        "into the tokens, or the tokens that hold them are cut off",
        "count the placeholder's id in input_ids as the model gets them, and compare the embeddings before and after "
        "the images are put in",
    ),
    _cause(
        "module_detached",
        "module_dead no_gradient",
        "a module is cut off from the loss: detach(), no_grad(), or a flag that freezes it",
        "look for what lies between the named module and the loss; call mark_stage() when it is frozen on purpose",
    ),
    _cause(
        "updates_rounded_away",
        "updates_rounded",
        "the weights are held in bfloat16 and the learning rate is too low for its last bit: nothing adds up",
        "keep the weights in float32 and compute under autocast, or use stochastic rounding or a higher rate",
    ),
    _cause(
        "weights_stand",
        "no_update weights_frozen not_in_optimizer",
        "the optimizer does not hold these weights, or its steps are lost",
        "compare the optimizer's parameters with the model's",
    ),
    _cause(
        "data_collapsed",
        "target_single",
        "the training data have become one answer: all targets are the same token",
        "look at the data from the first step named on: a filter, a mapping of answers, a sort by answer",
    ),
    _cause(
        "rank_broken",
        "rank_outlier",
        "one rank has other data, or computes wrongly",
        "compare the named rank's samples; move it to another device",
    ),
    _cause(
        "weights_damaged",
        "weights_jump",
        "weights were changed by something else than the optimizer: overwritten, loaded, frozen in part, or decayed",
        "go back to a checkpoint before the first step named; look at what was loaded, resized or frozen there",
    ),
    _cause(
        "loss_changed",
        "loss_differs",
        "the loss has become another: a temperature, a weight, smoothing, a reduction or an auxiliary term",
        "compare the trainer's loss with the mean cross-entropy of the same batch",
    ),
    _cause(detectors="underconfident", **_FORWARD_CHANGED),
    _cause(
        "too_smooth",
        "underconfident",
        "the targets are smoothed far too much, or the loss bounds or scales the logits",
        "look at label smoothing, temperatures and soft targets: the share that stays is 1 minus the smoothing",
    ),
    _cause(
        "rate_too_high",
        "worse_than_start",
        "the learning rate is too high for the weights that it began with, or the data are not theirs",
        "begin again from these weights with a lower rate or a longer warm-up; decode the first batches",
    ),
    _cause(
        "rate_too_high",
        "grad_spike modules_spike module_spike cal_up loss_cusum loss_regress loss_spike confidence_gap mass_excess "
        "back_to_prior worse_than_prior worse_than_uniform uniform_predictions single_answer mass_deficit "
        "copying",
        "the learning rate is too high: it was raised before",
        "go back to a checkpoint before the first step named; lower the rate or lengthen the warm-up",
        facts="rate_raised",
    ),
    _cause(
        "leak",
        "cal_down",
        "the answer has come into the prompt, or the task has become trivial",
        "decode the prompts of the named batch: the answer must not stand in them",
    ),
    _cause(
        "data_missing",
        "targets_missing",
        "a part of the data does not come any more: a shard, a task or a language is lost, or a filter drops answers",
        "compare the answers before and after the first step named; announce planned changes with mark_stage(name)",
    ),
    _cause(
        "gradient_lost",
        "grad_fall",
        "a part of the gradient is lost: micro-batches that do not count, a loss divided twice, weights that are "
        "frozen or cut off",
        "compare the gradient's norm of one micro-batch with that of the step; look at zero_grad, at accumulation and "
        "at requires_grad",
    ),
    _cause(
        "data_changed",
        "target_shift length_shift batch_shrunk",
        "the data are others from the first step named on",
        "nothing, if this was planned: announce it with mark_stage(name)",
    ),
    _cause(
        "images_lost",
        "image_lost image_unused",
        "the model does not use the images: shuffled against their questions, or cut off",
        "check that each image still belongs to its question; look at the projector's gradient",
    ),
    _cause(
        "labels_or_inputs_wrong",
        "cal_up loss_cusum loss_spike loss_regress confidence_gap mass_excess mass_deficit worse_than_uniform "
        "worse_than_prior gen_repetition",
        "targets or inputs are wrong from the first step named on: the targets themselves are others than they were",
        "decode the named batch: do question, image and answer belong together, and is the answer one?",
        facts="targets_changed",
    ),
    _cause(
        "optimisation",
        _RISEN,
        "the updates are others than they were: gradients that add up, are clipped away, scaled or lost",
        "look at zero_grad, at accumulation, clipping and the GradScaler from the first step named on",
        facts="updates_changed",
    ),
    _cause(
        "inputs_changed",
        _RISEN,
        "prompts or images are others than they were: a template, a tokenizer, an image processor",
        "decode the named batch and look at its images, as the model gets them",
        facts="abrupt inputs_changed",
    ),
    _cause(
        "labels_or_inputs_wrong",
        _RISEN,
        "targets or inputs are wrong from the first step named on: the model was as sure as before (noisy "
        "or shuffled labels, images of other samples)",
        "decode the named batch: do question, image and answer belong together?",
        facts="abrupt outputs_unchanged",
    ),
    _cause(
        "labels_or_inputs_wrong",
        _RISEN,
        "targets or inputs of a part of the data are wrong from the first step named on: some batches cost as much as "
        "before, and the model was as sure",
        "decode the worst samples of the named batch: do question, image and answer belong together, and which source "
        "do they come from?",
        facts="intermittent outputs_unchanged",
    ),
    _cause(detectors=_RISEN, **_FORWARD_CHANGED),
    _cause(
        "weights_damaged",
        _RISEN,
        "the model itself changed: an update that was too large, an optimizer state that was lost, weights "
        "that were overwritten",
        "go back to a checkpoint before the first step named; lower the rate; look at what was loaded or changed there",
        facts="abrupt outputs_changed",
    ),
    _cause(
        "optimisation",
        "modules_spike",
        "the gradients of several modules jump at the same step, which is no module's own: noise that is added, a "
        "scale or a reduction that went wrong, or updates that are too large",
        "look at what is done to gradients between backward and the optimizer's step: scaling, noise, the reduction "
        "over ranks, clipping; then at the rate",
    ),
    _cause(
        "module_broken",
        "module_spike",
        "one module's gradient explodes",
        "look at the named module: its inputs, its scale, its rate",
    ),
    _cause(
        "optimisation",
        "mass_excess single_answer copying mass_deficit back_to_prior uniform_predictions gen_repetition "
        "user_rules confidence_gap cal_up loss_cusum loss_regress worse_than_prior worse_than_uniform "
        "grad_spike loss_spike",
        "the optimisation went wrong: the rate, the batch size or the mix of data does not hold",
        "go back to a checkpoint before the first step named; lower the rate; look at what the data have in"
        " common there",
    ),
    _cause(
        "not_learning",
        "never_beyond_prior grad_vanish nothing_learned",
        "nothing is learned: a rate that is far too low, frozen or cut-off weights",
        "overfit one batch first; look at the rate and at which weights are trained",
    ),
    _cause(
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
