"""From the worker's likely causes to the coarse words that cases blame: where a cause sends a person to look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks.detection.case import Blame, Case

_L, _D, _I, _M, _W, _R, _O, _K, _Q = (
    Blame.LABELS, Blame.DATA, Blame.IMAGES, Blame.MODULE, Blame.WEIGHTS, Blame.RATE, Blame.OPTIMISER, Blame.RANKS,
    Blame.LOADER,
)  # fmt: skip

POINTS_TO: Final[Mapping[str, frozenset[Blame]]] = {
    "batch_without_labels": frozenset({_L}),
    "mask_inverted": frozenset({_D, _Q}),
    "padding_labelled": frozenset({_L}),
    "image_tokens_labelled": frozenset({_L}),
    "label_leak": frozenset({_L}),
    "label_shift": frozenset({_L}),
    "future_visible": frozenset({_M, _L}),
    "rows_mixed": frozenset({_M}),
    "padding_visible": frozenset({_M, _D}),
    "images_misplaced": frozenset({_I, _M}),
    "image_unreached": frozenset({_I, _M}),
    "stop_token_missing": frozenset({_L}),
    "answers_cut": frozenset({_L, _D}),
    "loader_stuck": frozenset({_Q}),
    "ranks_share_data": frozenset({_Q, _K}),
    "data_repeats": frozenset({_D, _Q}),
    "images_alike": frozenset({_I}),
    "replicas_apart": frozenset({_K}),
    "rate_is_zero": frozenset({_R}),
    "steps_skipped": frozenset({_O}),
    "projector_silent": frozenset({_M, _I}),
    "module_detached": frozenset({_M}),
    "weights_stand": frozenset({_O, _M}),
    "images_missing": frozenset({_I, _D}),
    "pixels_scaled": frozenset({_I}),
    "schedule_spent": frozenset({_R}),
    "optimizer_lost": frozenset({_O}),
    "optimizer_misset": frozenset({_O, _R}),
    "gradients_thrown_away": frozenset({_O}),
    "samples_empty": frozenset({_L, _D}),
    "begun_twice": frozenset({_D, _L}),
    "loss_changed": frozenset({_L, _O}),
    "too_smooth": frozenset({_L, _O}),
    "inputs_changed": frozenset({_D, _I}),
    "forward_changed": frozenset({_M, _I}),
    "bad_start": frozenset({_W}),
    "diverged": frozenset({_R, _O}),
    "numbers_lost": frozenset({_W, _O}),
    "data_collapsed": frozenset({_D, _L}),
    "rank_broken": frozenset({_K}),
    "rate_too_high": frozenset({_R}),
    "leak": frozenset({_D, _L}),
    "data_changed": frozenset({_D}),
    "updates_rounded_away": frozenset({_O, _W}),
    "labels_begin_late": frozenset({_L}),
    "templates_differ": frozenset({_D, _L}),
    "data_begun_anew": frozenset({_D, _Q}),
    "data_missing": frozenset({_D, _L}),
    "gradient_lost": frozenset({_O, _M}),
    "images_lost": frozenset({_I, _M}),
    "labels_or_inputs_wrong": frozenset({_L, _D, _I}),
    "module_broken": frozenset({_M}),
    "weights_damaged": frozenset({_W, _O}),
    "optimisation": frozenset({_O, _R}),
    "not_learning": frozenset({_R, _M}),
}
"""Cause to places. One that is not here (``generation``, ``unknown``, a newer one) sends nobody anywhere."""


def is_right(case: Case, causes: Sequence[tuple[int, str]]) -> bool:
    """Return whether the newest of the causes told sends a person to where the case's mistake is."""
    return bool(causes) and bool(POINTS_TO.get(causes[-1][1], frozenset()) & case.blame)
