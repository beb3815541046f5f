"""Every metric by name: what docs/metrics.md promises, the projection writes and the report groups.

A second table has what Sidestep says of itself, which docs/sidecar_metrics.md describes. Placeholders stand in braces:
``{module}``, ``{param}``, ``{group}``, ``{epoch}``, ``{rule}``, ``{kind}``. Tests compare the tables with the two pages
and with what a run really writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One metric."""

    key: str
    family: str
    form: str
    """``number``, ``count``, ``ratio``, ``flag``, ``text``, ``histogram`` or ``table``."""
    unit: str
    """``nats``, ``tokens``, ``steps``, ``seconds``, ... or empty."""
    over_ranks: str
    """How ranks become one value: ``sum``, ``max``, ``union``, ``merge`` (exact moments), ``rank 0`` or ``worker``."""
    summary: str


FAMILIES: Mapping[str, str] = {
    "tokens": "token_stats_interval",
    "loss": "loss_breakdown_interval",
    "gradients": "gradient_log_interval",
    "generation": "generation_eval_interval",
    "collapse": "collapse_detection_interval",
    "data": "answer_length_interval",
    "lr": "lr_interval",
}
"""Family to the name of its interval in the configuration."""

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Generation Quality": ("generation",),
    "Collapse Detection": ("collapse",),
    "Loss Analysis": ("loss",),
    "Token Statistics": ("tokens",),
    "Gradient Health": ("gradients", "lr"),
    "Data Quality": ("data",),
}
"""The six sections of the user's dashboard, to the families in each."""

SIDECAR_FAMILY = "sidecar"
"""The family of what Sidestep says of itself; it has no interval and none of the six sections."""

COLLAPSE_RULES = ("single_token_dominance", "low_diversity", "identical_sequences", "excessive_eos")
"""The user's rules, in the order in which reasons are joined."""

NO_TOKENS_GENERATED = "no_tokens_generated"
"""The reason that stands alone where every sample is empty."""

COLLAPSE_LINE = "⚠️ MODEL COLLAPSE DETECTED: {reason}"
"""What both consoles show, exactly."""

_ROWS = """
tokens/total_tokens|count|tokens|sum|positions in the batch, padding included
tokens/unique_tokens|count|tokens|union|distinct ids at real positions
tokens/unique_token_ratio|ratio||union|unique_tokens / vocabulary size
tokens/eos_count|count|tokens|sum|EOS ids at real positions
tokens/pad_ratio|ratio||sum|padding positions / total_tokens
tokens/image_token_ratio|ratio||sum|image placeholders / real positions
tokens/answer_length|number|tokens|sum|mean content tokens per answer
tokens/answer_diversity_ratio|ratio||sum|share of the most common id among the content tokens
tokens/answer_most_common_token_text|text||sum|that token, decoded
tokens/answers|count|answers|sum|runs of labelled positions
tokens/answer_tokens|count|tokens|sum|labelled positions
tokens/unique_answer_tokens|count|tokens|union|distinct ids at labelled positions
tokens/answer_eos_count|count|tokens|sum|EOS ids at labelled positions
loss/total|number|nats|sum|mean over the labelled tokens of the step
loss/first_token|number|nats|sum|mean over answers of the loss at the first labelled position
loss/later_tokens|number|nats|sum|mean over the other positions up to and with the answer's first EOS
loss/std|number|nats|merge|standard deviation (n - 1) over the labelled tokens
loss/max|number|nats|merge|largest loss of a token
loss/min|number|nats|merge|smallest loss of a token
loss/high_loss_token_ratio|ratio||merge|share of tokens with a loss over mean + 2 std
loss/first_vs_later_ratio|ratio||sum|first_token / later_tokens
loss/nonfinite_tokens|count|tokens|sum|labelled tokens whose loss is not finite
loss/trainer|number|nats|sum|the trainer's own number, mean over micro-batches and ranks
loss/sampled_tokens|count|tokens|sum|tokens that were sampled, where the loss is not exact
loss/exact|flag||worker|1: every labelled token was kept; 0: merged from partials, or sampled
loss/highest_tokens|table||worker|the tokens with the highest losses and their contexts
gradients/{module}/{param}/norm|number||merge|L2 norm of the whole parameter's gradient
gradients/{module}/{param}/mean|number||merge|mean of its elements
gradients/{module}/{param}/std|number||merge|standard deviation (n - 1) of its elements
gradients/{module}/{param}/max|number||merge|largest absolute value of its elements
gradients/{module}/norm|number||merge|L2 norm over the module's parameters
gradients/{module}/log10_histogram|histogram||sum|log10 of the absolute values of the module's elements
gradients/global/total_norm|number||merge|L2 norm over all parameters
gradients/global/avg_norm|number||merge|arithmetic mean of the parameters' norms
gradients/global/nonfinite|count||sum|elements that are not finite
gradients/global/zero_ratio|ratio||sum|share of elements that are exactly zero
gradients/global/params_without_grad|count||union|trainable parameters without a gradient
gradients/global/clipped|flag||worker|1: taken after clipping, for want of a call before it
gradients/details|table||merge|the statistics that a run of more than 2,000 gradient keys moves into one table
generation/samples|table||rank 0|step, image, question, generated, target, length
generation/avg_length|number|tokens|rank 0|mean generated tokens per sample before the first EOS
generation/min_length|count|tokens|rank 0|fewest of them
generation/max_length|count|tokens|rank 0|most of them
generation/empty_ratio|ratio||rank 0|share of samples without a token before EOS
generation/hit_max_ratio|ratio||rank 0|share of samples that never ended
generation/failed|count|samples|rank 0|samples whose generation raised
generation/seconds|number|seconds|rank 0|wall time that the trainer waited
collapse/is_collapsed|flag||worker|the verdict
collapse/collapse_reason|text||worker|none, or the rules behind the verdict joined by +
collapse/reason_code|count||worker|the reason as a number: a bit per rule
collapse/most_common_token_text|text||worker|the most common content token, decoded
collapse/most_common_token_id|count||worker|its id
collapse/most_common_ratio|ratio||worker|its share of the content tokens
collapse/unique_tokens|count|tokens|worker|distinct ids among the content tokens
collapse/token_diversity|ratio||worker|unique_tokens / content tokens
collapse/eos_ratio|ratio||worker|EOS tokens / all tokens, content and EOS
collapse/total_tokens|count|tokens|worker|content tokens
collapse/unique_sequences|count|samples|worker|distinct sequences
collapse/rule/{rule}|flag||worker|each rule, literally
data/answer_length_mean_epoch_{epoch}|number|tokens|sum|mean content tokens of the epoch's answers so far
data/answer_length_std_epoch_{epoch}|number|tokens|sum|their standard deviation (n - 1)
data/answer_length_min_epoch_{epoch}|count|tokens|sum|the shortest
data/answer_length_max_epoch_{epoch}|count|tokens|sum|the longest
data/single_token_answers_ratio_epoch_{epoch}|ratio||sum|answers of one content token / answers
data/answer_length_histogram_epoch_{epoch}|histogram|tokens|sum|exact counts per length
data/answer_length_mean|number|tokens|sum|the same, against the axis epoch
data/answer_length_std|number|tokens|sum|the same, against the axis epoch
data/answer_length_min|count|tokens|sum|the same, against the axis epoch
data/answer_length_max|count|tokens|sum|the same, against the axis epoch
data/single_token_answers_ratio|ratio||sum|the same, against the axis epoch
data/answer_length_histogram|histogram|tokens|sum|the same, against the axis epoch
data/batches_without_labels|count||sum|micro-batches so far without one labelled position
lr/{group}|number||rank 0|the rate that the step was taken with
"""

_SIDECAR_ROWS = """
sidecar/produced|count|messages|sum|messages that the trainer had made when it was last heard, those it lost included
sidecar/journal_rows|count|messages|sum|messages that the run's rows were made of so far
sidecar/dropped/{kind}|count|messages|sum|messages of this kind that the trainer gave up
sidecar/refused|count|messages|sum|messages that the worker will never store, of all kinds
sidecar/refused/{kind}|count|messages|sum|those of this kind
sidecar/resent|count|messages|sum|messages that were sent again
sidecar/late_parts|count|messages|sum|messages of earlier steps that came since the closing before
sidecar/ranks_seen|count|ranks|worker|ranks that ended the step, where they are not all
sidecar/ranks_expected|count|ranks|worker|ranks that should have ended it, where they did not all
sidecar/ranks/loss|number|nats|max|mean loss of the signals' rows of the rank where it is highest
sidecar/ranks/loss_gap|number|nats|worker|how far it is above the median over ranks
sidecar/ranks/loss_rank|count||worker|that rank
sidecar/ranks/forward_seconds|number|seconds|max|host time to the end of the last forward of the rank that took longest
sidecar/ranks/forward_seconds_gap|number|seconds|worker|how far it is above the median over ranks
sidecar/ranks/forward_seconds_rank|count||worker|that rank
sidecar/ranks/gradient_norm|number||worker|norm of the gradient of the model copy that is farthest from the median
sidecar/ranks/gradient_norm_gap|number||worker|how far it is from the median over copies: 0 where they are alike
sidecar/ranks/gradient_norm_rank|count||worker|the lowest rank of that copy
sidecar/lag_seconds|number|seconds|max|from the end of the step to the arrival of its last message
sidecar/hook_ms|number|milliseconds|max|time of the training thread in hooks during the step, generation left out
sidecar/overhead|ratio||max|share of the step's time that its signals took of the training thread, or of the device
sidecar/signal_rows_share|ratio||min|share of the wanted rows that the signals looked at
sidecar/tail_unknown|flag||worker|1: the trainer went without a goodbye, and what it had not sent is not known
sidecar/malformed_parts|count|messages|sum|messages of the step that contradict themselves or the run's tables
sidecar/unknown_ids|count|ids|sum|ids in the step's messages that are beyond the tokenizer's
sidecar/nonfinite_scalars|count|values|sum|values that the trainer logged at the step and that are NaN or infinite
sidecar/scalars_left_out|count|values|sum|values that it logged and that a row cannot hold
sidecar/refused_row|text||worker|why W&B was not told the values of this row
sidecar/table_id|text||worker|which table this is, the same where it had to be sent again
loss/trainer_nonfinite|count|batches|sum|micro-batches whose loss, as the trainer gave it, is not finite
gradients/global/coverage|ratio||merge|share of the elements that were reported, where ranks hold shares of parameters
gradients/global/params_incomplete|count||merge|parameters whose shares did not all come
gradients/global/params_partial|count||union|parameters whose gradient is a term of a sum over ranks, which no rank has
gradients/global/params_apart|count||worker|parameters of which ranks hold the same share with other gradients
train/step|count|steps|worker|the optimizer step that the row belongs to
train/attempt|count||worker|how often the run was resumed before
train/epoch|count|epochs|max|the epoch that the step belongs to
train/skipped|flag||worker|1: the optimizer did not take this step
epoch|count|epochs|max|the axis of the values under data/ that have no epoch in their name
"""

_INCIDENT_ROWS = """
incidents/open|count|incidents|worker|incidents that are open after the step
incidents/{name}|flag||worker|1: an incident of this name is open; 0: it was, and has closed
incidents/log|table||worker|each incident that opened, got worse, has another cause or closed
incidents/samples|table||worker|answers of the step at which an incident opened, worst first
"""


def _row(line: str, family: str = "") -> MetricSpec:
    key, form, unit, over_ranks, summary = line.split("|")
    family = family or key.split("/")[0]
    return MetricSpec(key=key, family=family, form=form, unit=unit, over_ranks=over_ranks, summary=summary)


METRICS: tuple[MetricSpec, ...] = tuple(map(_row, _ROWS.strip().splitlines()))
"""The table, in the order of docs/metrics.md."""

SIDECAR_METRICS: tuple[MetricSpec, ...] = tuple(
    _row(line, SIDECAR_FAMILY) for line in _SIDECAR_ROWS.strip().splitlines()
)
"""What Sidestep says of itself, in the order of docs/sidecar_metrics.md."""

INCIDENT_METRICS: tuple[MetricSpec, ...] = tuple(map(_row, _INCIDENT_ROWS.strip().splitlines()))
"""What the detectors say, in the order of docs/detection.md."""


@lru_cache(maxsize=1)
def _patterns() -> tuple[tuple[re.Pattern[str], MetricSpec], ...]:
    literal_first = sorted((*METRICS, *SIDECAR_METRICS, *INCIDENT_METRICS), key=lambda spec: spec.key.count("{"))
    return tuple((re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(spec.key))), spec) for spec in literal_first)


def spec_of(key: str) -> MetricSpec | None:
    """Return the tables' row for a key as a run writes it, or None for a user's own scalar."""
    return next((spec for pattern, spec in _patterns() if pattern.fullmatch(key)), None)
