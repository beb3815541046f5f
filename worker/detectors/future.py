"""A causal mask that is lost: the loss at a position changes with the tokens that follow it (``Probe``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView


class Future:
    """Judges each probe by itself: a position that sees what follows sees it from the first one on.

    In a causal model the change is 0 to the last bit, in half precision too: the same kernels run on the same shapes.
    A mixture of experts with a limit of tokens an expert leaks a little: which token is left out may depend on others.
    """

    name = "future"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        change = view.record.future_change
        if change is None:
            return ()
        limit = self._settings.future_visible.threshold
        evidence = f"with later answer tokens exchanged for others, the loss before them changes by {change:.3g} nats"
        return (
            Reading(name="future_visible", value=change, limit=limit, is_beyond=change >= limit, evidence=evidence),
        )

    def forget(self) -> None:
        """Keep nothing."""

    def state(self) -> Json:
        """Return nothing: no probe is compared with another."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over nothing."""
