"""A causal mask that is lost is told at the first probe that sees it, with its cause; a causal model's never."""

from __future__ import annotations

import math

import pytest
from tests.support.detector_traces import Drawn, Failure, Task, Told, trace, watched

from sidestep.protocol.messages import Probe
from sidestep.worker.detectors.catalogue import KINDS, Severity

TASK = Task(batch=8)


def probed(change: float, *, rows: int = 24, every: int = 10, images: int = 0) -> Failure:
    """Send a probe now and then; with images, one that was probed for both."""

    def fail(drawn: Drawn) -> None:
        if drawn.step % every == 0:
            loss, rolled = (0.5, 1.5) if images else (math.nan, math.nan)
            drawn.extra.append(
                Probe(
                    step=drawn.step, loss=loss, rolled_loss=rolled, labelled=8 * bool(images), images=images,
                    future_rows=rows, future_change=change,
                )
            )  # fmt: skip

    return fail


def told(failure: Failure, *, steps: int = 60, onset: int = 0) -> Told:
    return watched(trace(TASK, steps, failure=failure, onset=onset))


@pytest.mark.parametrize("change", [0.002, 0.02, 3.0])
@pytest.mark.parametrize("images", [0, 8])
def test_the_first_probe_that_sees_it_opens_an_incident(change: float, images: int) -> None:
    found = told(probed(change, images=images), onset=25)
    assert found.openings == [(30, "future_visible")]
    assert "a causal mask is missing: each position sees the answer that it is to give" in found.blocks
    assert "is_causal" in found.blocks
    assert f"changes by {change:.3g} nats" in found.blocks


@pytest.mark.parametrize(
    "failure",
    [probed(0.0), probed(1e-6), probed(0.001), probed(0.5, rows=0), probed(math.nan), probed(math.inf)],
    ids=["nothing", "rounding", "little", "no rows", "no number", "infinite"],
)
def test_a_causal_model_is_quiet(failure: Failure) -> None:
    assert told(failure).openings == []


def test_it_is_said_once_and_again_after_two_clean_probes() -> None:
    lasting = told(probed(0.5), steps=400)
    assert [name for _, name in lasting.openings] == ["future_visible"]

    def comes_and_goes(drawn: Drawn) -> None:
        probed(0.5 if drawn.step < 20 or drawn.step > 260 else 0.0)(drawn)

    assert [(step, name) for step, name in told(comes_and_goes, steps=300).openings] == [
        (0, "future_visible"),
        (270, "future_visible"),
    ]


def test_it_is_critical_and_exact_and_no_collapse() -> None:
    kind = KINDS["future_visible"]
    assert (kind.severity, kind.is_exact, kind.is_collapse) == (Severity.CRITICAL, True, False)
