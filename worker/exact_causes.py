"""Likely causes that one step's numbers tell, with nothing to compare them with: the first part of the table.

They go before all others, as an exact check names what is wrong; ``incident_causes.py`` has the rest.
"""

from __future__ import annotations

from typing import Final

from sidestep.worker.cause import Cause, cause

EXACT_CAUSES: Final[tuple[Cause, ...]] = (
    cause(
        "batch_without_labels",
        "no_labels",
        "the chat template, the truncation or ignore_index leaves a batch without a label",
        "look at the collator's output for the named batch; drop or fill samples whose answer was cut away",
    ),
    cause(
        "mask_inverted",
        "label_masked_pos",
        "the attention mask is inverted or belongs to other rows: all that has a label is padding by it",
        "print input_ids beside attention_mask: 1 is for what is read, 0 for padding",
        facts="all_masked",
    ),
    cause(
        "padding_labelled",
        "label_masked_pos pad_labelled",
        "labels are not masked at padding",
        "set labels to ignore_index where attention_mask is 0 (mind pad == eos: mask by position, not by id)",
    ),
    cause(
        "image_tokens_labelled",
        "image_tokens_labelled",
        "labels are not masked at image placeholders",
        "set labels to ignore_index where the input id is the image token",
    ),
    cause(
        "label_leak",
        "label_leak",
        "labels are not shifted: each position predicts its own input",
        "shift labels by one, once: in the data or in the model's loss",
    ),
    cause(
        "label_shift",
        "label_alignment",
        "labels are shifted twice, or cut apart from their inputs",
        "compare input_ids[i + 1] with labels[i]; tell the hooks with shifted= which convention holds",
    ),
    cause(
        "rows_mixed",
        "rows_mixed",
        "rows of a batch are mixed: an axis of rows is taken for one of positions, a mask lets rows see each other, or "
        "images are put into other rows",
        "look at view, reshape, transpose and permute from ids to logits, at the attention mask's shape, and at the "
        "order in which images are put in; a mixture of experts with a limit of tokens may do it by design",
    ),
    cause(
        "future_visible",
        "future_visible",
        "a causal mask is missing: each position sees the answer that it is to give",
        "look at the attention mask and is_causal that reach the attention kernel, in training mode and with the "
        "batch's padding or packing",
    ),
    cause(
        "padding_visible",
        "padding_visible",
        "the attention mask is not applied: answers depend on what stands at padding",
        "look at whether the mask reaches the attention kernel, mind left padding; where the model counts positions or "
        "averages over all of them, padding may be read by design",
    ),
    cause(
        "stop_token_missing",
        "no_stop_token",
        "EOS is not among the labels: another tokenizer's EOS, or masked as padding (pad == eos), or cut off",
        "decode a few labels; append EOS after the answer and keep it out of the padding mask",
    ),
    cause(
        "answers_cut",
        "answers_truncated",
        "longer samples are truncated before their answer ends",
        "raise the maximum length, or drop what does not fit",
    ),
    cause(
        "samples_empty",
        "rows_without_labels",
        "many samples have no labelled position: their answer was cut off, or the mask finds no answer in them",
        "decode a few such samples: look at the maximum length, and at the text by which the mask finds the answer",
    ),
    cause(
        "labels_begin_late",
        "labels_late",
        "labels begin behind the first tokens of the answers: the template is measured in other tokens, or the mask is "
        "off by one",
        "print and decode the ids around the first label of some samples: it must be the answer's first token",
    ),
    cause(
        "templates_differ",
        "template_differs",
        "training and generation do not share their template, or the answers' first tokens are masked",
        "print a training sample beside Sample.prompt_ids: render both by one apply_chat_template, the prompt with "
        "add_generation_prompt=True, and label the answer from its first token on",
    ),
    cause(
        "begun_twice",
        "begun_twice",
        "the beginning is added twice: by the chat template, and by the tokenizer once more",
        "tokenize the template's text with add_special_tokens=False, or take the token out of the template",
    ),
    cause(
        "loader_stuck",
        "dup_batch",
        "the loader hands out the same batch again: an iterator made anew at each step, or a stuck worker",
        "make the iterator once an epoch; look at the sampler's state after a resume",
    ),
    cause(
        "ranks_share_data",
        "dup_ranks",
        "the data are not split over ranks (or the split is undone by a skip)",
        "pass rank and world size to the sampler; look at .shard()/.skip() of a streaming data set",
    ),
    cause(
        "data_repeats",
        "dup_in_batch",
        "the sampler draws the same few samples",
        "look at the sampler, the shuffling buffer and the shards that are read",
    ),
    cause(
        "images_alike",
        "image_constant",
        "images are lost or overwritten before the model: a failed download's stand-in, a wrong index, a blank frame",
        "look at the pixel values of the named batch, as the model gets them",
    ),
    cause(
        "images_missing",
        "images_missing",
        "images are dropped: the placeholder is no token of the tokenizer, or the key is none of the model's",
        "print a batch's keys and decode its input_ids: is the image's placeholder one id, and are the pixels there?",
    ),
    cause(
        "pixels_scaled",
        "image_scale",
        "pixels are on another scale: not divided, divided twice, or normalised with other numbers",
        "print minimum, maximum and mean of the pixels as the model gets them; compare the image processor's settings",
    ),
    cause(
        "data_repeats",
        "data_repeats",
        "the sampler draws the same few samples",
        "look at the sampler, the shuffling buffer and the shards that are read",
    ),
    cause(
        "data_begun_anew",
        "data_rewound",
        "the data have begun anew: a resume that does not skip what was seen, or epochs that all come in one order",
        "restore the sampler's state with the checkpoint; shuffle, and call set_epoch() at each epoch's begin",
    ),
    cause(
        "replicas_apart",
        "rank_desync",
        "replicas are not synchronised: a rank skipped a reduction, or a device computes wrongly",
        "restart from the last checkpoint; test the named rank's device",
    ),
    cause(
        "rate_is_zero",
        "lr_zero",
        "the schedule gives 0: its length is in other units than the steps, or it was not restored",
        "print the schedule's rate over the steps to come",
    ),
    cause(
        "schedule_spent",
        "lr_spent",
        "the schedule was made for fewer steps: it is stepped too often, or its length is that of one rank or epoch",
        "compare the schedule's length with the optimizer steps to come; step it once an optimizer step",
    ),
    cause(
        "gradients_thrown_away",
        "gradients_lost",
        "zero_grad is called within the accumulation: of a step's micro-batches only the last ones count",
        "call zero_grad once an optimizer step, before the first micro-batch or after optimizer.step()",
    ),
    cause(
        "optimizer_lost",
        "optimizer_reset",
        "the optimizer's state was lost: it was made anew, cleared, or not loaded with the checkpoint",
        "load the optimizer's state with the weights; make the optimizer once, outside the loop",
    ),
    cause(
        "optimizer_misset",
        "optimizer_settings settings_changed",
        "the optimizer's settings are not those that were meant: betas in the wrong order, a decay or eps that is far "
        "too large, or another configuration since the step named",
        "print optimizer.param_groups without their parameters, and compare it with the configuration that was meant; "
        "announce planned changes with mark_stage(name)",
    ),
    cause(
        "bad_start",
        "init_loss",
        "weights are not initialised, or new rows of the embedding are far too large",
        "look at what from_pretrained reports as newly initialised",
    ),
    cause(
        "diverged",
        "nonfinite",
        "the learning rate is too high: it was raised before",
        "go back to a checkpoint before the first step named; lower the rate or lengthen the warm-up",
        facts="rate_raised",
    ),
    cause(
        "diverged",
        "nonfinite",
        "the training diverged: the gradient rose first",
        "go back to a checkpoint before the first step named; lower the rate, clip the gradient, skip the "
        "named batches",
        facts="gradient_up",
    ),
    cause(
        "numbers_lost",
        "nonfinite",
        "an operation gave NaN or infinity: a division by 0, a log of 0, an overflow in half precision",
        "run the named batch again in float32 with anomaly detection",
    ),
    cause(
        "steps_skipped",
        "updates_skipped",
        "the gradient overflows at every scale, or its scale is lost",
        "train in bfloat16, or lower the rate; look at the GradScaler's scale",
    ),
    cause(
        "projector_silent",
        "image_embed_zero image_embed_constant",
        "the projector's output tells nothing of the image: zero or dead weights, or its input is constant",
        "look at the projector's weights and at what the vision encoder gives it",
    ),
    cause(
        "images_misplaced",
        "image_misplaced",
        "the images of a row are put in at the places of others: in another order, or counted from another row",
        "compare the order of images and of placeholders in a row with several images, as the model gets them",
    ),
    cause(
        "image_unreached",
        "image_unreached",
        "what the image gives is dropped on its way: no position has the placeholder's id, features are not merged "
        "into the tokens, or the tokens that hold them are cut off",
        "count the placeholder's id in input_ids as the model gets them, and compare the embeddings before and after "
        "the images are put in",
    ),
    cause(
        "module_detached",
        "module_dead no_gradient",
        "a module is cut off from the loss: detach(), no_grad(), or a flag that freezes it",
        "look for what lies between the named module and the loss; call mark_stage() when it is frozen on purpose",
    ),
    cause(
        "updates_rounded_away",
        "updates_rounded",
        "the weights are held in bfloat16 and the learning rate is too low for its last bit: nothing adds up",
        "keep the weights in float32 and compute under autocast, or use stochastic rounding or a higher rate",
    ),
    cause(
        "weights_stand",
        "no_update weights_frozen not_in_optimizer",
        "the optimizer does not hold these weights, or its steps are lost",
        "compare the optimizer's parameters with the model's",
    ),
)
