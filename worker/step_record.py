"""One step as every detector sees it: all ranks merged, of a fixed size whatever the batch.

``record_building.py`` makes it of an ``AssembledStep``. It is the unit of replay: ``from_bytes(as_bytes())`` gives an
equal record, and equal records give equal verdicts. What was not sent, or contradicted itself, is absent here (None or
an empty array), and a detector that needs it does not judge the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.errors import DecodeError
from sidestep.protocol.signals import SIGNAL_COUNTS
from sidestep.protocol.tables import decode_table, encode_table

MAX_RECORD_BYTES: Final = 16 << 10
"""Longest ``as_bytes()`` (docs/trainer.md, section 5)."""
MAX_RECORD_ROWS: Final = 960
"""Labelled positions that a record holds; of more, whole answers are left out evenly."""
MAX_RECORD_RANKS: Final = 48
"""Ranks whose rows are told apart; those of further ranks count under rank -1."""
MAX_BATCH_RANKS: Final = 32
"""Ranks whose batches are compared with their own earlier ones."""
MAX_MEAN_IDS: Final = 64
MAX_MODULES: Final = 48
MAX_RATES: Final = 16
MAX_LOGGED: Final = 16
MAX_LOGGED_NAME_BYTES: Final = 32
MAX_SKETCH: Final = 16
"""Hashes of the step's samples that are compared with earlier steps: those that are smallest when mixed."""
MAX_ID: Final = (1 << 24) - 1
"""Largest token id: ids are stored in three bytes. Rows with larger ones are left out."""

RECORD_VERSION: Final = 3

_FORMS: Final[Mapping[str, str]] = {
    "targets": "id",
    "predictions": "id",
    "losses": "<f2",
    "entropies": "<f2",
    "eos_probabilities": "<f2",
    "places": "u1",
    "ranks": "<i4",
    "rank_rows": "<i4",
    "mean_ids": "id",
    "mean_probabilities": "<f4",
    "mean_shares": "<f4",
    "module_norms": "<f4",
    "weight_norms": "<f4",
    "weights": "<f4",
    "rates": "<f8",
    "group_settings": "<f4",
    "sketch": "<i8",
    "batch_ranks": "<i4",
    "batch_digests": "<u4",
}
"""Array field to the form of its elements in the bytes; ``id`` is three bytes."""


def _nothing(dtype: str) -> Callable[[], NDArray[Any]]:
    return lambda: np.zeros(0, dtype)


_NO_IDS, _NO_HALVES, _NO_SINGLES, _NO_DOUBLES, _NO_BYTES, _NO_HASHES, _NO_DIGESTS = map(
    _nothing, ("<i4", "<f2", "<f4", "<f8", "u1", "<i8", "<u4")
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRecord:
    """One optimizer step over all ranks; shapes in brackets, ``n`` rows."""

    attempt: int = 0
    step: int = 0
    stage: str = ""
    """Name of the stage that begins here (``mark_stage``), or empty."""
    applied: bool | None = None
    """Whether the optimizer took the step on all ranks; None: nobody says."""
    ranks_expected: int = 1
    ranks_seen: int = 1
    eos_id: int = -1
    """-1: not known; the same for the next two."""
    pad_id: int = -1
    image_token_id: int = -1
    counts: Mapping[str, int] = field(default_factory=dict)
    """``SIGNAL_COUNTS`` by name, summed over ranks; what a rank does not know is absent."""
    labelled: int = 0
    """Labelled positions with logits that the rows stand for, over all ranks."""
    seen_rows: int = 0
    """Rows that the ranks sent, sound ones; ``targets`` holds at most ``MAX_RECORD_ROWS`` of them."""
    vocabulary: int = 0
    """Width of the logits; 0: not known."""

    targets: NDArray[np.int32] = field(default_factory=_NO_IDS)
    """Target id of each row, ranks one after another [n]."""
    predictions: NDArray[np.int32] = field(default_factory=_NO_IDS)
    """Most probable id of each row [n], or empty."""
    losses: NDArray[np.float16] = field(default_factory=_NO_HALVES)
    """Loss of each row in nats, finite [n]."""
    entropies: NDArray[np.float16] = field(default_factory=_NO_HALVES)
    """Entropy of each prediction in nats, finite [n], or empty."""
    eos_probabilities: NDArray[np.float16] = field(default_factory=_NO_HALVES)
    """Probability of EOS at each row [n], or empty."""
    places: NDArray[np.uint8] = field(default_factory=_NO_BYTES)
    """Place of each row in its answer; 0 begins one [n]."""
    ranks: NDArray[np.int32] = field(default_factory=_NO_IDS)
    """Ranks that have rows, ascending; -1 last, for all beyond ``MAX_RECORD_RANKS`` [r]."""
    rank_rows: NDArray[np.int32] = field(default_factory=_NO_IDS)
    """How many of the rows are each rank's [r]."""

    loss: float | None = None
    """Mean loss over all rows sent, ranks weighted by their labelled positions; else the trainer's own."""
    trainer_loss: float | None = None
    """Mean of the trainer's own numbers, over micro-batches and ranks."""
    entropy: float | None = None
    """Mean entropy, weighted the same."""
    top_probability: float | None = None
    mean_ids: NDArray[np.int32] = field(default_factory=_NO_IDS)
    """Ids with the highest mean probability over all rows sent, highest first [k]."""
    mean_probabilities: NDArray[np.float32] = field(default_factory=_NO_SINGLES)
    """Those mean probabilities; lower bounds where ranks differ in which ids they name [k]."""
    mean_shares: NDArray[np.float32] = field(default_factory=_NO_SINGLES)
    """Share of each of those ids among the targets of the same rows [k]."""
    mean_rest: float = 1.0
    """No id that is not named can have a higher mean probability than this."""
    mean_slack: float = 0.0
    """A named id's mean probability can be higher by this, where ranks differ in which ids they name."""

    nonfinite_losses: int = 0
    """Rows and, at due steps, labelled positions whose loss is no number."""
    nonfinite_trainer_losses: int = 0
    nonfinite_gradients: int = 0
    """1 where the norm or an element of the gradient is not finite though the step was applied."""
    nonfinite_weight_ranks: tuple[int, ...] = ()
    """Ranks with a sampled weight that is no number (the first 8)."""

    samples: int = 0
    """Sample hashes; 0: not known."""
    distinct_samples: int = 0
    """How many of them differ, images told apart where each sample has one."""
    images: int = 0
    distinct_images: int = 0
    flat_images: int = -1
    """Images whose pixels do not vary; -1: not known."""
    image_mean: float | None = None
    """Median over the images of the mean of their pixels."""
    image_deviation: float | None = None
    """Median over the images of the standard deviation of their pixels."""
    constant_image_ranks: tuple[int, ...] = ()
    """Ranks of which all of at least 4 images are the same, or flat (the first 8)."""
    duplicate_ranks: tuple[int, ...] = ()
    """Ranks whose samples are those of a lower rank (the first 8)."""
    batch_digest: int = 0
    """Stands for the samples of all ranks; 0: not known."""
    batch_ranks: NDArray[np.int32] = field(default_factory=_NO_IDS)
    """Ranks that told of their samples, ascending: ``MAX_BATCH_RANKS`` of several, none of a single one [b]."""
    batch_digests: NDArray[np.uint32] = field(default_factory=_NO_DIGESTS)
    """Stands for the samples of each of them [b]."""
    sketch: NDArray[np.int64] = field(default_factory=_NO_HASHES)
    """A few of the samples' hashes, the same ones whenever the samples are the same [<= 16]."""

    projector_rms: float | None = None
    projector_spread: float | None = None
    gradient_norm: float | None = None
    """Norm of the whole gradient before clipping; absent where the step was not applied."""
    module_norms: NDArray[np.float32] = field(default_factory=_NO_SINGLES)
    """Norm of each module's gradient, the largest over ranks; -1: it had none, NaN: no number [m], or empty."""
    module_flags: tuple[int, ...] = ()
    """Of each module: 1 trainable by the table, 2 of the image's side by its name [m]."""
    weight_norms: NDArray[np.float32] = field(default_factory=_NO_SINGLES)
    """Norm of each module's trainable weights after the step, the largest over ranks; -1: none, NaN: no number [m],
    or empty."""
    weights: NDArray[np.float32] = field(default_factory=_NO_SINGLES)
    """The sampled weights of the lowest rank, after the step [h], or empty."""
    weights_ungrouped: int = 0
    """How many of them, the last ones, are of parameters that the optimizer has in no group."""
    weights_digest: int = 0
    """Stands for the sampled weights of the lowest rank; 0: not known. Equal digests are equal weights."""
    weights_kind: int = 0
    """Which weights those are."""
    desynced_ranks: tuple[int, ...] = ()
    """Ranks whose sampled weights differ from those of a lower rank that holds the same ones (the first 8)."""
    rates: NDArray[np.float64] = field(default_factory=_NO_DOUBLES)
    """Learning rate of each group, of the lowest rank [groups], or empty."""
    group_settings: NDArray[np.float32] = field(default_factory=_NO_SINGLES)
    """``GROUP_SETTINGS`` of each group, of the lowest rank [4 * groups], or empty; NaN: not known."""
    gradients_lost: int = 0
    """Micro-batches at which the gradients of those before had vanished, the most over ranks."""
    optimizer_steps: float | None = None
    """Updates that the optimizer's state counts: the most over groups, the least over ranks that have one."""
    probe_loss: float | None = None
    probe_rolled_loss: float | None = None
    probe_labelled: int = 0
    future_change: float | None = None
    """Mean absolute change, in nats, of the loss at positions behind which answer tokens were replaced."""
    apart_change: float | None = None
    """The same of rows that stayed as they were while others of the batch were changed."""
    padding_change: float | None = None
    """The same of rows whose padding was replaced."""
    image_change: float | None = None
    """Largest absolute change, in nats, of the loss at answers whose images were replaced."""
    last_image_change: float | None = None
    """The same behind the last image of a row, which alone was replaced: the median over rows."""
    misplaced_change: float | None = None
    """Mean absolute change, in nats, of the loss at answers before that image."""
    step_seconds: float | None = None
    """Of the slowest rank, waits for the hooks left out."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the trainer logged with the step (``hooks.log``), by name: the first ``MAX_LOGGED`` names."""

    def count(self, name: str) -> int | None:
        """Return one of ``SIGNAL_COUNTS``; None where it is not known."""
        return self.counts.get(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepRecord) and self.as_bytes() == other.as_bytes()

    def __hash__(self) -> int:
        return hash(self.as_bytes())

    def as_bytes(self) -> bytes:
        """Return the record in at most ``MAX_RECORD_BYTES`` bytes; equal records are equal bytes."""
        plain: list[Any] = [RECORD_VERSION]
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _FORMS:
                plain.append(_packed(value, _FORMS[each.name]))
            elif each.name == "counts":
                plain.append([value.get(name, -1) for name in SIGNAL_COUNTS])
            elif isinstance(value, Mapping):
                plain.append(dict(sorted(value.items())))
            else:
                plain.append(value)
        return encode_table(plain)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Return the record that these bytes are of.

        Raises:
            DecodeError: these bytes are no record of this version.
        """
        plain = decode_table(content)
        names = [each.name for each in fields(cls)]
        if not isinstance(plain, list) or len(plain) != len(names) + 1 or plain[0] != RECORD_VERSION:
            raise DecodeError(f"not a step's record of version {RECORD_VERSION}")
        values: dict[str, Any] = dict(zip(names, plain[1:], strict=True))
        try:
            for name, form in _FORMS.items():
                values[name] = _unpacked(values[name], form)
            counts = zip(SIGNAL_COUNTS, values["counts"], strict=True)
            values["counts"] = {name: count for name, count in counts if count >= 0}
        except (TypeError, ValueError) as error:
            raise DecodeError(f"not a step's record: {error}") from error
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**values)


def _packed(values: NDArray[Any], form: str) -> bytes:
    if form != "id":
        return values.astype(form, copy=False).tobytes()
    return values.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


def _unpacked(content: bytes, form: str) -> NDArray[Any]:
    if form != "id":
        return np.frombuffer(content, form)
    wide = np.zeros((len(content) // 3, 4), np.uint8)
    wide[:, :3] = np.frombuffer(content, np.uint8).reshape(-1, 3)
    return wide.view("<i4").reshape(-1)
