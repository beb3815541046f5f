"""What Sidestep says of itself: the table against docs/sidecar_metrics.md, and beside the user's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sidestep.protocol.metric_names import FAMILIES, METRICS, SIDECAR_FAMILY, SIDECAR_METRICS, spec_of

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "sidecar_metrics.md").read_text(encoding="utf-8")

PROMISED = [  # docs/delivery.md, section 6, and the page of metrics
    "sidecar/dropped/losses",
    "sidecar/refused",
    "sidecar/refused/tokens",
    "sidecar/resent",
    "sidecar/lag_seconds",
    "sidecar/ranks_seen",
    "sidecar/late_parts",
    "sidecar/journal_rows",
    "sidecar/tail_unknown",
]


def test_the_page_ends_in_this_very_table() -> None:
    listed = re.findall(r"^\| `(.+?)` \| (\w+) \| (.*?) \| (.+?) \| (.+?) \|$", DOCUMENT, re.MULTILINE)
    assert listed == [(spec.key, spec.form, spec.unit, spec.over_ranks, spec.summary) for spec in SIDECAR_METRICS]


@pytest.mark.parametrize("key", PROMISED)
def test_what_was_promised_is_in_the_table(key: str) -> None:
    spec = spec_of(key)
    assert spec is not None
    assert spec.family == SIDECAR_FAMILY


def test_the_two_tables_share_no_name_and_no_family() -> None:
    keys = [spec.key for spec in (*METRICS, *SIDECAR_METRICS)]
    assert len(set(keys)) == len(keys)
    assert SIDECAR_FAMILY not in FAMILIES
    assert {spec.family for spec in SIDECAR_METRICS} == {SIDECAR_FAMILY}


def test_every_name_in_the_text_of_the_page_is_in_the_table() -> None:
    named = set(re.findall(r"`((?:sidecar|train)/[a-z_{}/]+)`", DOCUMENT))
    assert len(named) > len(PROMISED)
    assert [key for key in named if spec_of(key) is None] == []
