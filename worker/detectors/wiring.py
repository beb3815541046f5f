"""How the model is wired, by what the probes changed: the future, other rows, padding, images (``Probe``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

MIN_PROBE_LABELLED: Final = 16
"""Labelled positions over which the image probe's two losses are the same number by no chance."""
MIN_PROBE_LOSS: Final = 1e-3
"""Nats below which a loss may be the same number whatever is shown: what is certain does not change."""
_CHANGED: Final = {
    "rows_mixed": "with answer tokens or images of other rows exchanged, a row's loss changes by {:.3g} nats",
    "future_visible": "with later answer tokens exchanged for others, the loss before them changes by {:.3g} nats",
    "image_misplaced": "with the last image of a row exchanged, the loss of answers before it changes by {:.3g} nats",
    "padding_visible": "with other ids where the attention mask is 0, the loss of answers changes by {:.3g} nats",
}


class Wiring:
    """Judges each probe by itself: what is wired wrongly is so from the first step on.

    What must not change does not change to the last bit, in half precision too: the same kernels run on the same
    shapes. A mixture of experts with a limit of tokens an expert leaks a little: which token is left out may depend on
    others, of the row or of the batch.
    """

    name = "wiring"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record, settings = view.record, self._settings
        rules = {
            "rows_mixed": (settings.rows_mixed, record.apart_change),
            "future_visible": (settings.future_visible, record.future_change),
            "padding_visible": (settings.padding_visible, record.padding_change),
            "image_misplaced": (settings.image_misplaced, record.misplaced_change),
        }
        readings = [
            Reading(
                name=name,
                value=change,
                limit=rule.threshold,
                is_beyond=change >= rule.threshold,
                evidence=_CHANGED[name].format(change),
            )
            for name, (rule, change) in rules.items()
            if change is not None
        ]
        return [*readings, *_images(record)]

    def forget(self) -> None:
        """Keep nothing."""

    def state(self) -> Json:
        """Return nothing: no probe is compared with another."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over nothing."""


def _images(record: StepRecord) -> Iterator[Reading]:
    """Images that reach an answer change its loss, were it by the last bit: only exactly nothing is beyond."""
    if record.distinct_images < 2:
        return  # the same image in another's place is no other image
    change, moved, where = record.image_change, "each image", "any answer"
    if change is None and record.probe_loss is not None and record.probe_rolled_loss is not None:
        if record.probe_labelled < MIN_PROBE_LABELLED or record.probe_loss < MIN_PROBE_LOSS:
            return
        change, where = abs(record.probe_rolled_loss - record.probe_loss), f"{record.probe_labelled} answer tokens"
    if record.last_image_change is not None and change != 0.0:
        change, moved = record.last_image_change, "the last image of each row"
        where = "the answers behind it, in most rows,"
    if change is None:
        return
    evidence = f"with {moved} in the place of another the loss of {where} changes by {change:.3g} nats"
    yield Reading(name="image_unreached", value=change, limit=0.0, is_beyond=change == 0.0, evidence=evidence)
