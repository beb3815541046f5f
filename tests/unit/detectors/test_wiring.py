"""What is wired wrongly is told at the first probe that sees it, with its cause; a sound model's never."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tests.support.detector_traces import Drawn, Failure, Task, Told, probe, trace, watched

from sidestep.protocol.messages import Probe
from sidestep.worker.detectors.catalogue import KINDS, Severity
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.detectors.wiring import MIN_PROBE_LABELLED, MIN_PROBE_LOSS, Wiring
from sidestep.worker.step_record import StepRecord

TASK = Task(batch=8)
FIELDS = {
    "future_visible": "future",
    "rows_mixed": "apart",
    "padding_visible": "padding",
    "image_misplaced": "misplaced",
}
CAUSES = {
    "future_visible": ("a causal mask is missing: each position sees the answer that it is to give", "is_causal"),
    "rows_mixed": ("rows of a batch are mixed", "permute"),
    "padding_visible": ("the attention mask is not applied", "left padding"),
    "image_misplaced": (
        "the images of a row are put in at the places of others",
        "order of images and of placeholders",
    ),
}
SOUND = Probe(
    step=0, loss=math.nan, rolled_loss=math.nan, labelled=0, images=0,
    future_rows=12, apart_rows=12, padding_rows=24, image_rows=24, image_change=0.25,
    last_image_rows=24, last_image_change=0.25, misplaced_rows=24,
)  # fmt: skip


def probed(found: dict[str, float], *, every: int = 10, images: int = 0) -> Failure:
    """Send a probe now and then; with images, one that was probed for what they are worth too."""

    def fail(drawn: Drawn) -> None:
        if drawn.step % every == 0:
            worth = {"loss": 0.5, "rolled_loss": 1.5, "labelled": 64, "images": images} if images else {}
            values: dict[str, float] = {**found, **worth}
            drawn.extra.append(replace(SOUND, step=drawn.step, **values))  # type: ignore[arg-type]

    return fail


def told(failure: Failure, *, steps: int = 60, onset: int = 0) -> Told:
    return watched(trace(TASK, steps, failure=failure, onset=onset))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("change", [0.002, 3.0])
@pytest.mark.parametrize("images", [0, 8])
def test_the_first_probe_that_sees_it_opens_an_incident(name: str, change: float, images: int) -> None:
    found = told(probed({f"{FIELDS[name]}_change": change}, images=images), onset=25)
    assert found.openings == [(30, name)]
    assert all(words in found.blocks for words in CAUSES[name])
    assert f"changes by {change:.3g} nats" in found.blocks


@pytest.mark.parametrize("part", FIELDS.values())
@pytest.mark.parametrize(
    ("change", "rows"),
    [(0.0, 24), (1e-4, 24), (0.5, 0), (math.nan, 24), (math.inf, 24)],
    ids=["nothing", "little", "no rows", "no number", "infinite"],
)
def test_a_sound_model_is_quiet(part: str, change: float, rows: int) -> None:
    assert told(probed({f"{part}_change": change, f"{part}_rows": rows})).openings == []


def test_rows_that_are_mixed_let_the_future_and_padding_through_as_well() -> None:
    found = told(probed({"apart_change": 0.001, "future_change": 0.5, "padding_change": 0.01}))
    assert found.openings == [(0, "rows_mixed")]
    assert "rows of a batch are mixed" in found.blocks
    found = told(probed({"future_change": 0.5, "padding_change": 0.01}))
    assert found.openings == [(0, "future_visible")]
    assert "a causal mask is missing" in found.blocks


def test_images_that_change_nothing_do_not_reach_the_answers() -> None:
    found = told(probed({"image_change": 0.0}), onset=25)
    assert found.openings == [(30, "image_unreached")]
    assert "with each image in the place of another the loss of any answer changes by 0 nats" in found.blocks
    assert "what the image gives is dropped on its way" in found.blocks
    for sound in (probed({"image_change": 1e-7}), probed({"image_change": 0.0, "image_rows": 0})):
        assert told(sound, onset=25).openings == []


def test_a_last_image_that_changes_nothing_is_not_reached_though_others_are() -> None:
    found = told(probed({"last_image_change": 0.0}), onset=25)
    assert found.openings == [(30, "image_unreached")]
    assert "the loss of the answers behind it, in most rows, changes by 0 nats" in found.blocks
    assert told(probed({"last_image_change": 0.0, "last_image_rows": 0}), onset=25).openings == []


def test_the_image_probe_says_the_same() -> None:
    def unchanged(drawn: Drawn) -> None:
        if drawn.step % 10 == 0:
            drawn.extra.append(probe(drawn.step, 0.0))

    found = told(unchanged, onset=25)
    assert found.openings == [(30, "image_unreached")]
    assert "the loss of 96 answer tokens changes by 0 nats" in found.blocks


@pytest.mark.parametrize(
    ("changes", "is_beyond"),
    [
        ({}, True),
        ({"probe_rolled_loss": math.nextafter(0.5, 1.0)}, False),
        ({"image_change": 1e-7}, False),
        ({"image_change": 0.0, "probe_rolled_loss": 2.0}, True),
        ({"distinct_images": 1}, None),
        ({"probe_labelled": MIN_PROBE_LABELLED - 1}, None),
        ({"probe_loss": MIN_PROBE_LOSS / 2, "probe_rolled_loss": MIN_PROBE_LOSS / 2}, None),
        ({"probe_loss": None}, None),
    ],
)
def test_only_losses_that_could_have_changed_tell_of_images(
    changes: dict[str, float | None], is_beyond: bool | None
) -> None:
    record = StepRecord(images=8, distinct_images=8, probe_loss=0.5, probe_rolled_loss=0.5, probe_labelled=64)
    read = Wiring(DetectorSettings()).read(StepView(replace(record, **changes)))  # type: ignore[arg-type]
    assert [reading.is_beyond for reading in read] == ([] if is_beyond is None else [is_beyond])


def test_it_is_said_once_and_again_after_two_clean_probes() -> None:
    lasting = told(probed({"future_change": 0.5}), steps=400)
    assert [name for _, name in lasting.openings] == ["future_visible"]

    def comes_and_goes(drawn: Drawn) -> None:
        probed({"future_change": 0.5 if drawn.step < 20 or drawn.step > 260 else 0.0})(drawn)

    assert [(step, name) for step, name in told(comes_and_goes, steps=300).openings] == [
        (0, "future_visible"),
        (270, "future_visible"),
    ]


@pytest.mark.parametrize("name", [*FIELDS, "image_unreached"])
def test_they_are_critical_and_exact_and_no_collapse(name: str) -> None:
    kind = KINDS[name]
    assert (kind.severity, kind.is_exact, kind.is_collapse) == (Severity.CRITICAL, True, False)
