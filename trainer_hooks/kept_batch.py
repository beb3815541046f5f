"""A micro-batch of a due step, kept until the step has ended; and what the probes that look at it again share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from sidestep.protocol.messages import Message
from sidestep.trainer_hooks.capture import Batch, ForwardReader
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.cross_entropy import LogitsSource, logits_source

_OF_A_FUSED_LOSS = ("fused_lm_head", "shift_labels", "num_items_in_batch")
"""Arguments that ask for a fused loss, or belong to it (TRL's): without labels it cannot be had."""

Ran = tuple[dict[str, Tensor], Callable[[Mapping[str, Any]], Sequence[Message]]]
"""Device tensors, and what makes the messages of them once they are on the host."""


class StepProbe(Protocol):
    """Looks at a micro-batch of a due step once more, when the step has ended."""

    name: str
    """Where its exceptions are counted."""

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is probed."""
        ...

    def see(self, given: Mapping[str, Any]) -> None:
        """Keep the arguments of the first of a due step's forwards that it can use."""
        ...

    def keep(self, batch: Batch, align: Callable[[Batch], AlignedBatch]) -> None:
        """Take the labels that belong to what was seen."""
        ...

    def run(self, step: int) -> Ran | None:
        """Look at what was kept, and let go of it; None where nothing was."""
        ...


class KeptBatch:
    """A forward's arguments and its labels: the one place where the hooks keep tensors of the trainer's beyond a call.

    Those on the host are copied: trainers change theirs in place.
    """

    def __init__(self) -> None:
        self._given: dict[str, Any] | None = None
        self._aligned: AlignedBatch | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no forward was kept yet."""
        return self._given is None

    def see(self, given: Mapping[str, Any]) -> None:
        """Keep a forward's arguments, unless those of another are kept."""
        if self._given is None:
            self._given = {name: _kept(value) for name, value in given.items()}

    def keep(self, batch: Batch, align: Callable[[Batch], AlignedBatch]) -> None:
        """Take the labels that belong to what was seen."""
        labels = batch.labels
        if self._given is not None and self._aligned is None and labels is not None:
            kept = labels.clone() if labels.is_cpu else labels
            self._aligned = align(Batch(labels=kept, shifted=batch.shifted, captured=batch.captured))

    def take(self) -> tuple[dict[str, Any], AlignedBatch] | None:
        """Return what was kept, and let go of it; None where a part is missing."""
        given, aligned, self._given, self._aligned = self._given, self._aligned, None, None
        return None if given is None or aligned is None else (given, aligned)


class AskedLogits:
    """Calls the model for its logits; one whose loss is fused has none while there are labels, and is asked without."""

    def __init__(self, model: nn.Module, reader: ForwardReader) -> None:
        self._model = model
        self._reader = reader
        self._without_labels = False

    def __call__(self, given: Mapping[str, Any], aligned: AlignedBatch) -> LogitsSource | None:
        """Call the model, and return where its logits are; None where its forward shows none in either way.

        Raises:
            Exception: whatever the model's forward raises.
            ValueError: the logits do not go with the labels.
        """
        labels = self._reader.label_argument
        if not self._without_labels:
            source = self._source(given, aligned)
            if source is not None or labels not in given:
                return source
            self._without_labels = True
        left_out = {labels, *_OF_A_FUSED_LOSS}
        return self._source({name: value for name, value in given.items() if name not in left_out}, aligned)

    def _source(self, given: Mapping[str, Any], aligned: AlignedBatch) -> LogitsSource | None:
        logits, _ = self._reader.outputs(self._model(**given), aligned.targets.shape)
        return None if logits is None else logits_source(logits, *aligned.targets.shape)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.is_cpu else value.detach()
    if type(value) in {list, tuple}:
        return type(value)([_kept(each) for each in value])
    return value
