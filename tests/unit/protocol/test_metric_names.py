"""The metric table against docs/metrics.md and the user's own list of names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sidestep.protocol.metric_names import COLLAPSE_LINE, COLLAPSE_RULES, FAMILIES, METRICS, SECTIONS, spec_of

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")

USERS_OWN = [
    "generation/samples",
    "generation/avg_length",
    "generation/min_length",
    "generation/max_length",
    "collapse/is_collapsed",
    "collapse/collapse_reason",
    "collapse/most_common_token_text",
    "collapse/most_common_ratio",
    "collapse/unique_tokens",
    "collapse/token_diversity",
    "collapse/eos_ratio",
    "tokens/total_tokens",
    "tokens/unique_tokens",
    "tokens/unique_token_ratio",
    "tokens/eos_count",
    "tokens/pad_ratio",
    "tokens/answer_length",
    "tokens/answer_diversity_ratio",
    "loss/total",
    "loss/first_token",
    "loss/later_tokens",
    "loss/std",
    "loss/max",
    "loss/min",
    "loss/high_loss_token_ratio",
    "loss/first_vs_later_ratio",
    "gradients/decoder/head_weight/norm",
    "gradients/decoder/head_weight/mean",
    "gradients/decoder/head_weight/std",
    "gradients/decoder/head_weight/max",
    "gradients/global/total_norm",
    "gradients/global/avg_norm",
    "data/answer_length_mean_epoch_0",
    "data/answer_length_std_epoch_0",
    "data/answer_length_min_epoch_0",
    "data/answer_length_max_epoch_0",
    "data/single_token_answers_ratio_epoch_0",
    "data/answer_length_histogram_epoch_0",
    "lr/modality_projector",
    "lr/vision_encoder",
    "lr/language_model",
]


@pytest.mark.parametrize("key", USERS_OWN)
def test_every_name_that_the_user_was_promised_is_in_the_table(key: str) -> None:
    assert spec_of(key) is not None


def test_every_family_of_the_table_has_an_interval_and_a_section() -> None:
    families = {spec.family for spec in METRICS}
    assert families == set(FAMILIES) == {family for group in SECTIONS.values() for family in group}


def test_every_section_stands_in_the_document() -> None:
    for section in SECTIONS:
        assert section in DOCUMENT


def test_the_document_ends_in_this_very_table() -> None:
    listed = re.findall(r"^\| `(.+?)` \| (\w+) \| (.*?) \| (.+?) \| (.+?) \|$", DOCUMENT, re.MULTILINE)
    assert listed == [(spec.key, spec.form, spec.unit, spec.over_ranks, spec.summary) for spec in METRICS]


def test_a_literal_name_wins_over_a_pattern() -> None:
    spec = spec_of("gradients/global/total_norm")
    assert spec is not None
    assert spec.key == "gradients/global/total_norm"
    assert spec_of("val_loss") is None


def test_keys_are_unique_and_the_rules_are_the_users() -> None:
    keys = [spec.key for spec in METRICS]
    assert len(set(keys)) == len(keys)
    assert all(rule in DOCUMENT for rule in COLLAPSE_RULES)
    assert COLLAPSE_LINE in DOCUMENT
