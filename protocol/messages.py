"""Every kind of message, as frozen dataclasses; the schema of the wire is read off these annotations (codec.py).

Evolution (docs/wire_protocol.md): a new field has a default, no field changes its type, no number is used twice,
unknown fields are skipped. Arrays are little-endian, C-contiguous and travel raw; everything else is msgpack.

Shapes in brackets name their axes; ``n`` and ``k`` are free. Steps are optimizer steps as the trainer counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from sidestep.protocol.message_base import (
    COMMAND_LATE,
    COMMAND_TAKEN,
    ArraySpec,
    Float32Array,
    Float64Array,
    Int32Array,
    Int32Matrix,
    Int64Array,
    Int64Matrix,
    Json,
    Kind,
    Lane,
    Message,
    Role,
    Uint8Array,
    empty,
)
from sidestep.protocol.signals import SIGNAL_COUNTS, Probe, Signals

__all__ = [
    "COMMAND_LATE",
    "COMMAND_TAKEN",
    "MESSAGE_TYPES",
    "SIGNAL_COUNTS",
    "STEP_KINDS",
    "UNSEQUENCED",
    "Ack",
    "Answers",
    "ArraySpec",
    "Blob",
    "Command",
    "Generation",
    "Goodbye",
    "Gradients",
    "Heartbeat",
    "Hello",
    "Json",
    "Kind",
    "Lane",
    "LearningRates",
    "Losses",
    "Message",
    "NoAck",
    "Notice",
    "Probe",
    "Refuse",
    "Reject",
    "Role",
    "Scalars",
    "Signals",
    "StepEnd",
    "Tokens",
    "Welcome",
]
"""All names of the messages, those of the modules beside included: everybody imports from here."""

# ---------------------------------------------------------------------------------------------- trainer -> worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """Who speaks: sent first on every connection, unsequenced, the same bytes each time."""

    kind = Kind.HELLO

    project: str = ""
    """W&B project; empty: the worker's own default."""
    entity: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    start_step: int = 0
    """The step that the first ``StepEnd`` of this incarnation is expected to carry."""
    world_size: int = 1
    topology: Mapping[str, Json] = field(default_factory=dict)
    """What rank this is: ``local_rank``, ``host``, ``pid``, ``wrapper``; ``data_parallel_rank`` of
    ``data_parallel_size`` (ranks with the same one see the same batches); since 1.2 ``copy``, the number of the copy of
    the parameters that it holds one of ``shares`` shares of, and ``mesh``: ``names``, ``shape``, ``coordinate``."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """``HooksConfig`` as a map: intervals, thresholds and verdict travel with the run, so that a replay has them."""
    run_config: Mapping[str, Json] = field(default_factory=dict)
    """The trainer's own configuration, shown as the run's config."""
    environment: Mapping[str, Json] = field(default_factory=dict)
    """Command line, git commit, versions, device names, start time."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Name (``parameters``, ``groups``, ``tokenizer``, ``samples``) to SHA-256 in hex of the blob that holds it."""
    capabilities: Mapping[str, str] = field(default_factory=dict)
    """Per family ``exact``, ``sampled`` or ``absent: reason`` (the support matrix, as far as it is known at attach)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob(Message):
    """The bytes of a table, sent when a worker asks for its hash; unsequenced, the same whoever sends it."""

    kind = Kind.BLOB

    digest: str
    """SHA-256 of ``content`` in hex."""
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Message):
    """Token counts of one micro-batch of a due step (docs/metrics.md, ``tokens/``)."""

    kind = Kind.TOKENS
    lane = Lane.STATISTICS

    step: int
    microstep: int
    positions: int
    """All positions of the batch, padding included."""
    padding: int
    """Positions that are not real; -1 where padding and EOS cannot be told apart."""
    answers: int
    """Runs of labelled positions."""
    real_ids: Int32Array
    """Distinct ids at real positions, ascending [n]."""
    real_counts: Int64Array
    """How often each stands there [n]."""
    labelled_ids: Int32Array
    """Distinct target ids at labelled positions, ascending [k]."""
    labelled_counts: Int64Array
    """How often each stands there [k]."""
    content_counts: Int64Array
    """How often each of ``labelled_ids`` stands before its answer's first EOS [k]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses(Message):
    """Per-token losses of one micro-batch of a due step, in nats, unreduced (docs/metrics.md, ``loss/``)."""

    kind = Kind.LOSSES
    lane = Lane.LOSS

    step: int
    microstep: int
    labelled: int
    """Labelled positions of the micro-batch, whether or not each has a loss here."""
    sampled: bool = False
    """True where ``losses`` is a sample of the labelled positions, not all of them."""
    losses: Float32Array = field(default_factory=lambda: empty(np.float32))
    """One loss per labelled position, non-finite ones included [n]; empty where ``histogram`` stands for them."""
    target_ids: Int32Array = field(default_factory=lambda: empty(np.int32))
    """The target at each of those positions [n]."""
    roles: Uint8Array = field(default_factory=lambda: empty(np.uint8))
    """``Role`` bits of each of those positions [n]."""
    highest: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Indices into ``losses`` of the largest finite ones, largest first [h]; with ``highest_losses`` for histograms."""
    highest_losses: Float32Array = field(default_factory=lambda: empty(np.float32))
    """Those losses [h]."""
    highest_targets: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Their target ids [h]."""
    contexts: Int32Matrix = field(default_factory=lambda: empty(np.int32, 2))
    """Ids before each of those targets, -1 where there is none [h, c]."""
    trainer_loss: Float32Array = field(default_factory=lambda: empty(np.float32))
    """The trainer's own number for this micro-batch [0 or 1]."""
    histogram: Int64Array = field(default_factory=lambda: empty(np.int64))
    """Counts over [0, LOSS_HISTOGRAM_MAX_NATS), where the step is too large to keep its tokens [bins or 0]."""
    partials: Float64Array = field(default_factory=lambda: empty(np.float64))
    """With ``histogram`` [10 or 0]: count, mean, M2, min, max, non-finite, first count and sum, later count and sum."""
    reason: str = ""
    """Why there are no per-token losses, where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients(Message):
    """Partial statistics of this rank's share of each parameter's gradient (docs/metrics.md, ``gradients/``).

    Moments are those of ``g * 2**-exponent``, so that no square over- or underflows in float32.
    """

    kind = Kind.GRADIENTS
    lane = Lane.STATISTICS

    step: int
    parameters: Int32Array
    """Rows of the table ``parameters`` [n]."""
    counts: Int64Array
    """Elements of the local share, non-finite ones included [n]."""
    nonfinite: Int64Array
    """Elements that are not finite; they are left out of all that follows [n]."""
    zeros: Int64Array
    """Finite elements that are exactly zero [n]."""
    exponents: Int32Array
    """Power of two that the moments are scaled by [n]."""
    means: Float64Array
    """Mean of the scaled finite elements [n]."""
    m2: Float64Array
    """Sum of squared deviations from that mean, scaled [n]."""
    absmax: Float64Array
    """Largest absolute value of the finite elements, unscaled [n]."""
    without_gradient: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Rows of trainable parameters that had no gradient at this step [k]."""
    histogram_modules: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Modules (their number in the table ``parameters``) that ``histograms`` describes [m]."""
    histograms: Int64Matrix = field(default_factory=lambda: empty(np.int64, 2))
    """Counts of log10 |g| over GRADIENT_HISTOGRAM_LOG10_RANGE, finite non-zero elements [m, bins]."""
    scale: float = 1.0
    """The GradScaler's factor that these gradients still carry."""
    clipped: bool = False
    """True where they were taken after clipping, for want of a call before it."""
    partial: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Rows whose gradient is a term of a sum over ranks, or lies otherwise than this rank's share: not among
    ``parameters`` [p]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers(Message):
    """Content lengths of all answers of one step and epoch, due or not: the epoch's distribution counts each once."""

    kind = Kind.ANSWERS
    lane = Lane.STATISTICS

    step: int
    epoch: int
    lengths: Int32Array
    """Distinct content lengths in tokens, ascending [n]."""
    counts: Int64Array
    """Answers of each length [n]."""
    labelled: int
    """Labelled positions of the step."""
    batches: int
    """Micro-batches of the step."""
    batches_without_labels: int = 0
    """Micro-batches without one labelled position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation(Message):
    """What the model generated from the samples of the table ``samples`` (docs/metrics.md, ``generation/``)."""

    kind = Kind.GENERATION
    lane = Lane.TABLES

    step: int
    samples: Int32Array
    """Rows of the table ``samples`` [n]."""
    offsets: Int64Array
    """Sample i generated ``ids[offsets[i]:offsets[i + 1]]``, its first EOS included, nothing after it [n + 1]."""
    ids: Int32Array
    """Generated ids of all samples, one after another [total]."""
    failed: Int32Array = field(default_factory=lambda: empty(np.int32))
    """Rows of samples whose generation raised [k]."""
    failures: tuple[str, ...] = ()
    """What was raised, once per distinct text."""
    max_new_tokens: int = 64
    seconds: float = 0.0
    """Wall time that the trainer waited for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRates(Message):
    """The rates that this step was taken with, one per row of the table ``groups``."""

    kind = Kind.LEARNING_RATES
    lane = Lane.STATISTICS

    step: int
    rates: Float64Array
    """[groups]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalars(Message):
    """What the trainer itself logs, under its own names and against its own step key."""

    kind = Kind.SCALARS
    lane = Lane.STATISTICS

    step: int
    """The optimizer step it belongs to."""
    values: Mapping[str, Json]
    """Name to number, text or bool; non-finite numbers are allowed."""
    step_key: str = ""
    """Name of the trainer's own step axis, or empty for ``train/step``."""
    key_step: int = 0
    """Value on that axis."""
    reduce: str = ""
    """``mean``, ``sum``, ``min`` or ``max`` over the ranks that log these names; empty: the lowest rank's stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd(Message):
    """A rank is done with a step; never dropped (docs/delivery.md, section 2)."""

    kind = Kind.STEP_END

    step: int
    unix_time: float
    """The trainer's clock when the step ended, in seconds; the row's ``_timestamp``."""
    applied: bool = True
    """False where the optimizer step was skipped (GradScaler)."""
    epoch: int = 0
    sent: Mapping[str, int] = field(default_factory=dict)
    """Kind's name (lower case) to the number of messages of this step that were handed to the publisher."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """The same for those that were dropped before the publisher had them (staging skips)."""
    due: tuple[str, ...] = ()
    """Families that were due at this step."""
    hook_seconds: float = 0.0
    """Wall time that the training thread spent in hooks during the step, generation left out."""
    stage: str = ""
    """Name of the stage that begins with this step (``mark_stage``): other data or another objective, on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    """The trainer lives; unsequenced, its head carries the accounts."""

    kind = Kind.HEARTBEAT

    newest_step: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye(Message):
    """The incarnation's last sequenced message of this rank."""

    kind = Kind.GOODBYE

    newest_step: int = -1
    exit_code: int = 0
    """0: closed by the trainer; otherwise the run is marked as failed."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Message):
    """A line for people, either way: printed once by the other side's console, exactly as it is."""

    kind = Kind.NOTICE

    text: str
    code: str = ""
    """A stable short name, by which repeats are counted instead of shown."""
    level: str = "warning"
    """``info``, ``warning`` or ``critical``."""
    step: int = -1


# ---------------------------------------------------------------------------------------------- worker -> trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """The answer to the first message of an unknown connection: only after it does a publisher send or resend."""

    kind = Kind.WELCOME

    instance: str
    """Random id of this worker process."""
    committed: Int64Matrix = field(default_factory=lambda: empty(np.int64, 2))
    """Inclusive ranges [first, last] of this stream's sequence numbers that the journal holds [n, 2]."""
    hello_known: bool = False
    wanted: tuple[str, ...] = ()
    """Digests of the blobs that this rank is asked to send."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack(Message):
    """These sequence numbers are in the journal, on disk."""

    kind = Kind.ACK

    committed: Int64Matrix
    """Inclusive ranges [first, last] [n, 2]."""
    wanted: tuple[str, ...] = ()
    """Digests of blobs still missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoAck(Message):
    """Messages arrive but cannot be stored now (a full disk); the publisher keeps them and warns once."""

    kind = Kind.NO_ACK

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse(Message):
    """This one message will never be stored; the publisher counts it as refused and forgets it."""

    kind = Kind.REFUSE

    sequence: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject(Message):
    """The worker will not talk to this publisher at all (another major version); it goes idle and says so once."""

    kind = Kind.REJECT

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Message):
    """Something the trainer is asked to do at a step boundary; opt-in, and ignored unless the trainer looks."""

    kind = Kind.COMMAND

    action: str
    """``stop``, ``checkpoint`` or ``sample``."""
    command_id: str = ""
    reason: str = ""
    at_step: int = -1
    """Not before this step; -1: the next one."""


_TO_WORKER: tuple[type[Message], ...] = (
    Hello, Blob, Tokens, Losses, Gradients, Answers, Generation, LearningRates, Scalars, StepEnd, Heartbeat, Goodbye,
    Notice, Signals, Probe,
)  # fmt: skip
_TO_TRAINER: tuple[type[Message], ...] = (Welcome, Ack, NoAck, Refuse, Reject, Command)

MESSAGE_TYPES: Mapping[int, type[Message]] = {cls.kind: cls for cls in (*_TO_WORKER, *_TO_TRAINER)}
"""Kind to its dataclass; ``CHUNK`` has none, since it is a piece of another message (frames.py)."""

UNSEQUENCED = frozenset({Kind.HELLO, Kind.BLOB, Kind.HEARTBEAT, *(k for k in Kind if k >= Kind.WELCOME)})
"""Kinds that carry sequence number 0: they are idempotent, and neither journaled by number nor acked."""

STEP_KINDS = (
    Kind.TOKENS,
    Kind.LOSSES,
    Kind.GRADIENTS,
    Kind.ANSWERS,
    Kind.GENERATION,
    Kind.LEARNING_RATES,
    Kind.SCALARS,
    Kind.SIGNALS,
    Kind.PROBE,
)
"""Kinds that belong to a step and are counted in its ``StepEnd``."""
