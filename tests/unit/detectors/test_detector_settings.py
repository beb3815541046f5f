from __future__ import annotations

from dataclasses import fields

import pytest

from sidestep.worker.detectors.catalogue import KINDS
from sidestep.worker.detectors.rules import Rule
from sidestep.worker.detectors.settings import DetectorSettings, apply_assignments, detector_names


def test_every_detector_has_a_rule_and_a_kind() -> None:
    assert set(detector_names()) == set(KINDS)
    settings = DetectorSettings()
    assert all(isinstance(getattr(settings, each.name), Rule) for each in fields(settings))
    for name in detector_names():
        rule = settings.rule(name)
        assert rule is not None
        assert 1 <= rule.hits <= rule.window


def test_assignments_change_one_threshold_each() -> None:
    settings = apply_assignments(
        DetectorSettings(),
        [
            "detectors.mass_excess.threshold=0.1",
            "detectors.mass_excess.hits = 2",
            "detectors.cal_up.enabled=false",
            "detectors.loss_cusum.rate=5e-3",
        ],
    )
    assert (settings.mass_excess.threshold, settings.mass_excess.hits) == (0.1, 2)
    assert settings.cal_up.enabled is False
    assert settings.loss_cusum.rate == 0.005
    assert settings.mass_deficit == DetectorSettings().mass_deficit


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("mass_excess.threshold=0.1", "write detectors.NAME.FIELD=VALUE"),
        ("detectors.mass_excess.threshold", "write detectors.NAME.FIELD=VALUE"),
        ("detectors.mass_excess=0.1", "write detectors.NAME.FIELD=VALUE"),
        ("detectors.mass_exces.threshold=0.1", "no detector 'mass_exces'; there are nonfinite, no_labels"),
        ("detectors.rule.threshold=0.1", "no detector 'rule'"),
        ("detectors.mass_excess.limit=0.1", "detectors.mass_excess.limit: mass_excess has no setting 'limit'"),
        ("detectors.mass_excess.threshold=high", "detectors.mass_excess.threshold: 'high' is not a number"),
        ("detectors.mass_excess.hits=1.5", "'1.5' is not a whole number"),
        ("detectors.mass_excess.enabled=maybe", "'maybe' is not true or false"),
        ("detectors.mass_excess.threshold=-1", "is not a finite number of at least 0"),
        ("detectors.mass_excess.threshold=inf", "is not a finite number of at least 0"),
        ("detectors.mass_excess.threshold=nan", "is not a finite number of at least 0"),
    ],
)
def test_a_wrong_assignment_names_the_option_and_what_is_valid(assignment: str, text: str) -> None:
    with pytest.raises(ValueError, match="--set") as raised:
        apply_assignments(DetectorSettings(), [assignment])
    assert text in str(raised.value)
