"""docs/detection.md names every detector with its severity, and every key that incidents have in a run."""

from __future__ import annotations

import re
from pathlib import Path

from sidestep.protocol.metric_names import INCIDENT_METRICS, spec_of
from sidestep.worker.detectors.catalogue import KINDS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "detection.md").read_text(encoding="utf-8")


def test_every_detector_stands_with_its_severity_and_title() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| (yes)? ?\| (.+?) \|$", PAGE, re.MULTILINE)
    assert listed == [
        (name, kind.severity.level, "yes" if kind.is_collapse else "", kind.title) for name, kind in KINDS.items()
    ]


def test_every_key_of_incidents_stands_with_its_meaning() -> None:
    listed = re.findall(r"^\| `(incidents/.+?)` \| (\w+) \| (.*?) ?\| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)
    assert listed == [(each.key, each.form, each.unit, each.over_ranks, each.summary) for each in INCIDENT_METRICS]
    spec = spec_of("incidents/mass_excess")
    assert spec is not None
    assert spec.family == "incidents"
