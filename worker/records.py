"""What the parts of the worker hand to each other: parts of a step, whole steps, closings and what a run is.

All of it is frozen. A projection sees these records and nothing else, so that the same records give the same bytes,
live and in a replay (docs/delivery.md, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from sidestep.protocol.messages import Json, Kind, Message, Notice, StepEnd
from sidestep.worker.module_flags import module_flags

ClosingReason: TypeAlias = Literal["complete", "ended", "deadline", "tail"]
"""Why a step closed: all parts in; its incarnation ended; the deadline passed; or ``tail``: what came after the last
step of an incarnation that ended (late parts and notices, no ``StepEnd``), under that step's number."""


class TokenText(Protocol):
    """Ids to text; never raises: an id without text gives a readable stand-in."""

    def token(self, token_id: int) -> str:
        """Return the text of one id."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids in a row, special tokens left out."""
        ...


class Part(NamedTuple):
    """One journaled message of a rank."""

    rank: int
    message: Message
    incarnation: str = ""
    sequence: int = 0
    received_at: float = 0.0
    """The worker's clock when it arrived, in unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepClosing:
    """The assembler's decision, as it is journaled: a replay obeys it and decides nothing itself."""

    run_id: str
    attempt: int
    step: int
    reason: ClosingReason
    incarnation: str
    parts: tuple[tuple[int, int], ...]
    """(rank, sequence) of every message that went in, ``StepEnd`` and notices included, ascending."""
    late_parts: tuple[tuple[int, int], ...] = ()
    """(rank, sequence) of messages of earlier, closed steps of the same incarnation that are counted here."""
    ranks_expected: int = 1
    closed_number: int = -1
    """0, 1, 2, ... over the run's closings in the order they were made; -1 until it is written."""


class RankAccount(NamedTuple):
    """What one rank's publisher says of its messages, cumulative over its incarnation (docs/delivery.md, section 6)."""

    kinds: Mapping[str, tuple[int, int, int]] = MappingProxyType({})
    """Kind's name (lower case) to (produced, dropped, refused)."""
    resent: int = 0
    """Messages that were sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembledStep:
    """All that is known of one optimizer step when it closes."""

    run_id: str
    attempt: int
    step: int
    reason: ClosingReason
    parts: Mapping[Kind, tuple[Part, ...]] = field(default_factory=dict)
    """Kinds of ``STEP_KINDS`` to their parts, by rank, then in the order they were sent; absent kinds are absent."""
    ends: Mapping[int, StepEnd] = field(default_factory=dict)
    """Rank to its ``StepEnd``: the newest where it was sent again. May be empty."""
    ranks_expected: int = 1
    ranks_seen: int = 1
    """Ranks whose ``StepEnd`` is here."""
    late_parts: tuple[Part, ...] = ()
    """Parts of any kind that came after their own step had closed (their message says which step)."""
    notices: tuple[Notice, ...] = ()
    """What the trainer had to say, by rank, then in the order it was sent."""
    unix_time: float = 0.0
    """The trainer's clock when the step ended, the latest over ranks; without an end, when the last part arrived."""
    lag_seconds: float = 0.0
    """From the end of the step to the arrival of its last part, between two clocks; never below 0."""
    accounts: Mapping[int, RankAccount] = field(default_factory=dict)
    """Rank to what its newest message among these says of its publisher."""
    num_messages: int | None = 0
    """Journaled messages that went in, late ones, ``StepEnd`` and notices included, a ``Goodbye`` not; None where one
    came over the wire 1.0, for whose runs they are not counted."""

    @property
    def stage(self) -> str:
        """Name of the stage that begins with this step (``mark_stage``), the lowest rank's, or empty."""
        return next((end.stage for _, end in sorted(self.ends.items()) if end.stage), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What the Hellos and tables of one attempt say."""

    run_id: str
    attempt: int
    text: TokenText
    settings: Mapping[str, Any] = field(default_factory=dict)
    """``HooksConfig`` as a map, as the trainer sent it."""
    world_size: int = 1
    start_step: int = 0
    parameters: Mapping[str, Json] = field(default_factory=dict)
    """The table ``parameters`` of the lowest rank; empty where none is known."""
    parameters_by_rank: Mapping[int, Mapping[str, Json]] = field(default_factory=dict)
    """The same for ranks whose own table differs (shards, pipeline stages); ask ``parameters_of``."""
    groups: Mapping[str, Json] = field(default_factory=dict)
    """The table ``groups``."""
    tokenizer: Mapping[str, Json] = field(default_factory=dict)
    """The table ``tokenizer`` without its content: ``eos_id``, ``pad_id``, ``vocabulary_size``, ``special_ids``,
    ``image_token_id``."""
    samples: Mapping[str, Json] = field(default_factory=dict)
    """The table ``samples``."""
    topologies: Mapping[int, Mapping[str, Json]] = field(default_factory=dict)
    """Rank to what its Hello says of it."""
    capabilities: Mapping[str, str] = field(default_factory=dict)
    """Per family ``exact``, ``sampled`` or ``absent: reason``, of the lowest rank."""
    module_flags: tuple[int, ...] = field(init=False, default=())
    """What ``parameters`` says of each module (``module_flags.py``): every step asks, and the table is long."""

    def __post_init__(self) -> None:
        """Read the table once."""
        object.__setattr__(self, "module_flags", module_flags(self.parameters))

    @property
    def eos_id(self) -> int | None:
        """The id that ends an answer, where the tokenizer's table names one."""
        return _optional_int(self.tokenizer.get("eos_id"))

    @property
    def pad_id(self) -> int | None:
        """The id that pads, where the tokenizer's table names one."""
        return _optional_int(self.tokenizer.get("pad_id"))

    @property
    def image_token_id(self) -> int | None:
        """The id that stands for an image, where the tokenizer's table names one."""
        return _optional_int(self.tokenizer.get("image_token_id"))

    @property
    def vocabulary_size(self) -> int | None:
        """The tokenizer's length with added tokens, where its table names it."""
        return _optional_int(self.tokenizer.get("vocabulary_size"))

    def parameters_of(self, rank: int) -> Mapping[str, Json]:
        """Return the table that this rank's ``Gradients`` refer to."""
        return self.parameters_by_rank.get(rank, self.parameters)


def _optional_int(value: Json) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
