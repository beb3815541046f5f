"""The probe of the wiring: exactly 0 in a causal model, whatever its labels and rows, and not without its mask.

What a brief look finds changed is looked at thoroughly as soon as its numbers are on the host: a step or two later.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.wiring_models import (
    IMAGE,
    VOCABULARY,
    Fused,
    FusedWhenAsked,
    Shifted,
    Trained,
    Transformer,
)

from sidestep.trainer_hooks.wiring_probe import FIRST_STEP
from sidestep.worker.detectors.settings import DetectorSettings

LIMIT = DetectorSettings().future_visible.threshold


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["answers", "packed", "padded", "one token", "one token alike", "text"])
@pytest.mark.parametrize("model", [Transformer, Shifted])
@pytest.mark.parametrize("seen", ["causal", "everything", "lost in training"])
def test_a_causal_model_shows_nothing_and_one_without_its_mask_does(
    kind: str, model: type[Transformer], seen: str
) -> None:
    trained = Trained(model(seen), kind)
    assert trained.failures == {}
    first, probe = trained.probes[0], trained.probes[-1]
    assert first.step == FIRST_STEP
    assert (first.padding_change, first.future_change, first.apart_change) == (0.0, 0.0, 0.0)
    if seen == "causal":
        assert probe is first
        assert probe.padding_rows == (2 if kind == "padded" else 0)
        assert probe.future_change == 0.0
    else:
        assert (first.future_rows, first.apart_rows, first.padding_rows) == (0, 0, 0)
        assert FIRST_STEP < probe.step <= FIRST_STEP + 2
        assert probe.padding_rows == (4 if kind == "padded" else 0)
        assert probe.future_change > 2 * LIMIT
    assert probe.future_rows == (1 if kind == "one token alike" else 2)
    assert (probe.apart_rows, probe.apart_change) == (2, 0.0)
    assert (probe.padding_change, probe.image_rows, probe.image_change) == (0.0, 0, 0.0)
    assert probe.images == probe.labelled == 0
    assert probe.loss != probe.loss
    assert probe.seconds > 0


def test_a_sound_model_is_run_twice_and_another_as_often_as_there_are_changes() -> None:
    for seen, looks in (("causal", [2]), ("everything", [2, 6])):
        model = Transformer(seen)
        trained = Trained(model, "padded")
        assert model.calls - 13 == sum(looks)
        assert len(trained.probes) == len(looks)


def test_what_was_found_once_is_looked_at_briefly_again() -> None:
    model = Transformer("everything")
    trained = Trained(model, "padded", steps=40, wiring_probe_interval=24)
    assert [probe.future_rows for probe in trained.probes] == [0, 2] * 3
    assert model.calls - 40 == (2 + 6) + (2 + 4) * 2, "how far equal forwards differ is asked three times at first"


class Unsteady(Transformer):
    """Adds in another order each time, let us say."""

    def logits(self, *given: Any) -> torch.Tensor:
        return super().logits(*given) + 1e-6 * (self.calls % 5)


class Drawing(Transformer):
    """Leaves a layer out by chance, by numbers of its own."""

    def logits(self, *given: Any) -> torch.Tensor:
        made = super().logits(*given)
        return made * (1 + 0.1 * (self.calls % 3))


@pytest.mark.parametrize(("of", "rows_told"), [(Unsteady, 2), (Drawing, 0)])
def test_forwards_that_differ_anyway_are_looked_at_thoroughly_and_say_nothing(
    of: type[Transformer], rows_told: int
) -> None:
    trained = Trained(of(), "padded", steps=40, wiring_probe_interval=24)
    assert trained.failures == {}
    thorough = trained.probes[1:]
    assert [probe.step for probe in thorough[1:]] == [12, 36], "without a brief look before"
    assert {probe.future_rows for probe in thorough} == {rows_told}
    for probe in thorough:
        assert max(probe.future_change, probe.apart_change, probe.padding_change) < LIMIT or not rows_told


class Unpadded(Transformer):
    """Its mask does not reach the attention."""

    def logits(self, input_ids: torch.Tensor, documents: torch.Tensor | None, _: Any) -> torch.Tensor:
        return super().logits(input_ids, documents, None)


def test_padding_that_is_read_is_named() -> None:
    trained = Trained(Unpadded(), "padded")
    probe = trained.probes[-1]
    assert (probe.future_change, probe.apart_change) == (0.0, 0.0)
    assert probe.padding_rows == 4
    assert probe.padding_change > 2 * DetectorSettings().padding_visible.threshold


class Choosy(Transformer):
    """Raises at padding that is not padding."""

    def logits(self, input_ids: torch.Tensor, documents: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if attention_mask is not None and (input_ids[attention_mask == 0] > IMAGE).any():
            raise ValueError("there is something at padding")
        return super().logits(input_ids, documents, attention_mask)


def test_a_model_that_raises_at_other_padding_is_asked_for_the_rest() -> None:
    trained = Trained(Choosy(), "padded", steps=20)
    assert trained.failures == {"wiring_probe": 1}
    assert [probe.step for probe in trained.probes] == [2 * FIRST_STEP]
    assert (trained.probes[0].future_rows, trained.probes[0].padding_rows) == (2, 0)


def test_it_is_due_early_and_between_the_probes_of_images() -> None:
    trained = Trained(Transformer(), steps=41, wiring_probe_interval=12)
    assert [probe.step for probe in trained.probes] == [6, FIRST_STEP, 18, 30]
    assert [end.step for end in trained.ends if end.sent.get("probe")] == [6, FIRST_STEP, 18, 30]
    assert Trained(Transformer(), steps=21, wiring_probe_interval=0).probes == []
    assert Trained(Transformer(), steps=21, signal_rows_per_step=0).probes == []


@pytest.mark.parametrize("seen", ["causal", "everything"])
def test_half_precision_is_exact_as_well(seen: str) -> None:
    trained = Trained(Transformer(seen).bfloat16(), "text")
    assert trained.failures == {}
    probe = trained.probes[-1]
    assert probe.future_rows == 2
    assert (probe.future_change == 0.0) if seen == "causal" else (probe.future_change > 2 * LIMIT)


class Flattened(Transformer):
    """Its rows are one long row to the attention, as where a mask of the wrong shape is taken for causal alone."""

    def logits(self, input_ids: torch.Tensor, *given: Any) -> torch.Tensor:
        return super().logits(input_ids.reshape(1, -1), None, None).view(*input_ids.shape, VOCABULARY)


def test_rows_that_one_causal_mask_lets_see_those_above() -> None:
    probe = Trained(Flattened()).probes[-1]
    assert probe.apart_rows == 2
    assert probe.apart_change > 2 * DetectorSettings().rows_mixed.threshold


@pytest.mark.parametrize("kind", [Fused, FusedWhenAsked])
def test_a_fused_loss_is_asked_for_logits_without_labels(kind: type[Transformer]) -> None:
    for seen in ("causal", "everything"):
        trained = Trained(kind(seen))
        assert trained.failures == {}
        change = trained.probes[-1].future_change
        assert (change == 0.0) if seen == "causal" else (change > 2 * LIMIT)
