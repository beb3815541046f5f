"""One message, one ZeroMQ frame: a fixed prefix, a msgpack head, raw arrays. Large ones travel in chunks.

::

    0   "SST"  kind:u8  major:u8  minor:u8  reserved:u16  head_bytes:u32  body_bytes:u32      16 bytes, little-endian
    16  head   msgpack map {"e": envelope, "a": accounts, "n": resent, "f": fields, "r": arrays}   padded to 8
        body   the arrays' bytes, each padded to 8

Peers a major version apart do not decode each other; a kind of a later minor version decodes to ``UnknownMessage``.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple, NoReturn, cast

import msgpack  # type: ignore[import-untyped]
import numpy as np

from sidestep.protocol import array_frame, codec
from sidestep.protocol.errors import DecodeError, EncodeError, IncompatibleWireError, LimitExceededError
from sidestep.protocol.limits import (
    CHUNK_BYTES,
    MAX_ACCOUNTS,
    MAX_CHUNKS,
    MAX_HEAD_BYTES,
    MAX_HEAD_ENTRIES,
    MAX_IDENTITY_CHARACTERS,
    MAX_MAP_ENTRIES,
    MAX_MESSAGE_BYTES,
    MAX_NESTING_LEVELS,
    MAX_TEXT_BYTES,
)
from sidestep.protocol.messages import MESSAGE_TYPES, Kind, Message
from sidestep.protocol.packed_bounds import check_packed
from sidestep.protocol.version import WIRE_MAJOR, WIRE_MINOR

MAGIC = b"SST"
_PREFIX = struct.Struct("<3sBBBHII")
_PREFIX_BYTES: Final = _PREFIX.size
_BEHIND_MAGIC: Final = struct.Struct("<BBBHII")
NO_ACCOUNTS: Final[Mapping[str, tuple[int, int, int]]] = MappingProxyType({})
_COUNT_END: Final = 1 << 62
"""Counts and numbers on the wire stay below it: sums of them fit 64 bits."""
_WALK_HEAD_BYTES: Final = 1 << 10
"""A head of up to so many bytes is unpacked as it is: nested as deep as it can be, it makes under 3 MiB of lists."""
_HEAD_LEVELS: Final = MAX_NESTING_LEVELS + 4
"""Around a free-form value and its last, empty list are the head, its fields, and the field."""
_PARTIAL_BYTES: Final = 512
"""What it takes to keep track of a message in chunks, beside its pieces."""

Frame = bytes | bytearray | memoryview


class Envelope(NamedTuple):
    """Whose message this is, which one, and what became of those before it."""

    run_id: str
    incarnation: str
    rank: int
    sequence: int = 0
    """1, 2, ... per (incarnation, rank); 0 for kinds in ``messages.UNSEQUENCED``."""
    accounts: Mapping[str, tuple[int, int, int]] = NO_ACCOUNTS
    """Kind's name to (produced, dropped, refused), cumulative when the message was first sent."""
    resent: int = 0
    """Messages of this stream that were sent again until then, to a worker that had lost them."""


class FramePrefix(NamedTuple):
    """What the first 16 bytes say; enough to tell versions and kinds apart."""

    kind: int
    major: int
    minor: int
    head_bytes: int
    body_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownMessage:
    """A kind that a later minor version added: kept raw, acked, never an error."""

    kind: int


def peek(frame: Frame) -> FramePrefix:
    """Read the prefix of ``frame``.

    Raises:
        DecodeError: these bytes do not begin like a frame of this protocol.
    """
    kind, major, minor, _, head_bytes, body_bytes = _prefix(frame)
    return FramePrefix(kind, major, minor, head_bytes, body_bytes)


def _prefix(frame: Frame) -> tuple[int, int, int, int, int, int]:
    """Return what ``_PREFIX`` says behind the magic bytes."""
    if len(frame) < _PREFIX_BYTES:
        raise DecodeError(f"{len(frame)} bytes are too few for a frame")
    if frame[:3] != MAGIC:
        raise DecodeError("the frame does not begin with the protocol's magic bytes")
    return _BEHIND_MAGIC.unpack_from(frame, 3)


def _assemble(kind: int, head: Mapping[str, Any], buffers: list[bytes]) -> bytes:
    packed = cast("bytes", msgpack.packb(head, use_bin_type=True))
    if len(packed) > MAX_HEAD_BYTES:
        raise EncodeError(
            f"the head of a {Kind(kind).name} has {len(packed)} bytes, more than {MAX_HEAD_BYTES}; "
            "shorten the configuration or the texts in it"
        )
    body_bytes = array_frame.total_bytes(buffers)
    if _PREFIX.size + len(packed) + body_bytes > MAX_MESSAGE_BYTES:
        raise EncodeError(f"a {Kind(kind).name} of {body_bytes} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    prefix = _PREFIX.pack(MAGIC, kind, WIRE_MAJOR, WIRE_MINOR, 0, len(packed), body_bytes)
    return b"".join([prefix, packed, bytes(array_frame.padding(len(packed))), *buffers])


def _identity(envelope: Envelope) -> list[Any]:
    return [envelope.run_id, envelope.incarnation, envelope.rank, envelope.sequence]


def encode(envelope: Envelope, message: Message) -> bytes:
    """Return ``message`` as one frame.

    Raises:
        EncodeError: a field is not of its declared type, or the message is over a limit.
    """
    plain, arrays = codec.to_fields(message)
    descriptions, buffers = array_frame.pack(arrays)
    head: dict[str, Any] = {"e": _identity(envelope), "f": plain, "r": descriptions}
    if envelope.accounts:
        head["a"] = {name: list(counts) for name, counts in envelope.accounts.items()}
    if envelope.resent:
        head["n"] = envelope.resent
    return _assemble(message.kind, head, buffers)


def _refuse_extension(code: int, _content: bytes) -> NoReturn:
    raise ValueError(f"an extension of type {code}")


_unpack: Final[Callable[[Frame], Any]] = functools.partial(
    msgpack.unpackb, use_list=False, raw=False, strict_map_key=True, ext_hook=_refuse_extension, max_ext_len=0,
    max_str_len=MAX_TEXT_BYTES, max_bin_len=MAX_TEXT_BYTES, max_array_len=MAX_MAP_ENTRIES, max_map_len=MAX_MAP_ENTRIES,
)  # fmt: skip
_unpack_small: Final[Callable[[Frame], Any]] = functools.partial(
    msgpack.unpackb, use_list=False, ext_hook=_refuse_extension, max_ext_len=0
)
"""For a short head: nothing in it is longer, or has more entries, than the head has bytes; that is msgpack's default,
and so are texts for texts and no keys but texts and bytes."""


def _parts(frame: Frame) -> tuple[int, dict[str, Any], int]:
    """Return kind, head, and where the body begins."""
    kind, major, minor, _, head_bytes, body_bytes = _prefix(frame)
    if major != WIRE_MAJOR:
        raise IncompatibleWireError(major, minor)
    if head_bytes > MAX_HEAD_BYTES:
        raise LimitExceededError(f"a head of {head_bytes} bytes, more than {MAX_HEAD_BYTES}")
    head_end = _PREFIX_BYTES + head_bytes
    body_at = head_end + -head_bytes % array_frame.ALIGNMENT_BYTES
    if body_at + body_bytes != len(frame):
        raise DecodeError(f"the frame declares {body_at + body_bytes} bytes, {len(frame)} arrived")
    if len(frame) > MAX_MESSAGE_BYTES:
        raise LimitExceededError(f"a message of {len(frame)} bytes, more than {MAX_MESSAGE_BYTES}")
    try:
        if head_bytes <= _WALK_HEAD_BYTES:
            head = _unpack_small(frame[_PREFIX_BYTES:head_end])
        else:
            packed = memoryview(frame)[_PREFIX_BYTES:head_end]
            check_packed(packed, max_levels=_HEAD_LEVELS, max_entries=MAX_HEAD_ENTRIES)
            head = _unpack(packed)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise DecodeError(f"the head is not msgpack within limits: {error}") from error
    if type(head) is not dict:
        raise DecodeError("the head is not a map")
    return kind, head, body_at


def _envelope(head: Mapping[str, Any]) -> Envelope:
    entry = head.get("e")
    if type(entry) is not tuple or len(entry) < 4:
        raise DecodeError("the head has no envelope")
    run_id, incarnation, rank, sequence = entry[:4]
    if type(run_id) is not str or type(incarnation) is not str:
        raise DecodeError("a run or incarnation id is not a text")
    if len(run_id) > MAX_IDENTITY_CHARACTERS or len(incarnation) > MAX_IDENTITY_CHARACTERS:
        raise LimitExceededError(f"a run or incarnation id of more than {MAX_IDENTITY_CHARACTERS} characters")
    resent = head.get("n", 0)
    if not (type(rank) is type(sequence) is type(resent) is int):
        raise DecodeError("a rank, a sequence number or the count of resent messages is not an integer")
    if not (0 <= rank < _COUNT_END and 0 <= sequence < _COUNT_END and 0 <= resent < _COUNT_END):
        raise DecodeError("a rank, a sequence number or the count of resent messages is not a natural number")
    accounts = head.get("a")
    return Envelope(
        run_id, incarnation, rank, sequence, NO_ACCOUNTS if accounts is None else _accounts(accounts), resent
    )


def _accounts(entry: object) -> dict[str, tuple[int, int, int]]:
    if type(entry) is not dict:
        raise DecodeError("the accounts are not a map")
    if len(entry) > MAX_ACCOUNTS:
        raise LimitExceededError(f"accounts of {len(entry)} kinds, more than {MAX_ACCOUNTS}")
    for name, counts in entry.items():
        if (
            type(name) is not str
            or len(name) > MAX_IDENTITY_CHARACTERS
            or type(counts) is not tuple
            or len(counts) != 3
        ):
            raise DecodeError("an account is not a kind's three counts")
        produced, dropped, refused = counts
        if not type(produced) is type(dropped) is type(refused) is int:
            raise DecodeError("an account's counts are not integers")
        if not (0 <= produced < _COUNT_END and 0 <= dropped < _COUNT_END and 0 <= refused < _COUNT_END):
            raise DecodeError("an account's counts are not natural numbers")
    return entry


def identify(frame: Frame) -> Envelope:
    """Return whose message this is, and which one, chunks included; its fields and arrays are not looked at.

    Raises:
        DecodeError: not even that can be read.
        IncompatibleWireError: another major version.
    """
    return _envelope(_parts(frame)[1])


def decode(frame: Frame) -> tuple[Envelope, Message | UnknownMessage]:
    """Return the envelope and the message of one whole frame (no chunk); arrays are read-only views of it.

    Raises:
        DecodeError: not a message; ``LimitExceededError`` where a declared size is over its limit.
        IncompatibleWireError: another major version.
    """
    kind, head, body_at = _parts(frame)
    envelope = _envelope(head)
    arrays = array_frame.unpack(head.get("r", ()), frame, body_at)
    message_type = MESSAGE_TYPES.get(cast("Kind", kind))  # a number finds the kind that it is
    if message_type is None:
        if kind == Kind.CHUNK:
            raise DecodeError("a chunk is not a whole message")
        return envelope, UnknownMessage(kind=kind)
    fields = head.get("f", {})
    if type(fields) is not dict:
        raise DecodeError("the fields are not a map")
    return envelope, codec.from_fields(message_type, fields, arrays)


def split(envelope: Envelope, frame: bytes, chunk_bytes: int = CHUNK_BYTES) -> list[bytes]:
    """Return ``frame`` as it is, or as chunk frames where it is larger than ``chunk_bytes``."""
    if len(frame) <= chunk_bytes:
        return [frame]
    digest = hashlib.sha256(frame).hexdigest()
    pieces = [frame[at : at + chunk_bytes] for at in range(0, len(frame), chunk_bytes)]
    chunks = []
    for index, piece in enumerate(pieces):
        descriptions, buffers = array_frame.pack({"piece": np.frombuffer(piece, np.uint8)})
        head = {"e": _identity(envelope), "c": [digest, index, len(pieces), len(frame)], "r": descriptions}
        chunks.append(_assemble(Kind.CHUNK, head, buffers))
    return chunks


@dataclass(slots=True)
class _Partial:
    total_bytes: int
    pieces: list[bytes | None]
    missing: int
    held_bytes: int = 0

    @property
    def cost_bytes(self) -> int:
        return self.total_bytes + _PARTIAL_BYTES + 8 * len(self.pieces)


class ChunkJoiner:
    """Joins the chunks of one peer's messages; holds at most ``max_bytes`` of declared bytes, oldest given up first."""

    def __init__(self, max_bytes: int = 2 * MAX_MESSAGE_BYTES) -> None:
        """Start with nothing held."""
        self._max_bytes = max_bytes
        self._partials: OrderedDict[str, _Partial] = OrderedDict()
        self.held_bytes = 0
        """Bytes that the messages which are not yet whole may come to, and what it takes to keep track of them."""
        self.given_up = 0
        """Messages whose first chunks were forgotten to stay within ``max_bytes``."""

    def add(self, frame: Frame) -> tuple[Envelope, bytes | None]:
        """Take one chunk; return its envelope, and the whole message's frame once every chunk is here.

        Raises:
            DecodeError: a chunk that is malformed, contradicts its siblings, or a joined message of another digest.
        """
        kind, head, body_at = _parts(frame)
        if kind != Kind.CHUNK:
            raise DecodeError("a whole message is no chunk")
        envelope = _envelope(head)
        digest, index, count, total = self._placement(head.get("c"))
        piece = array_frame.unpack(head.get("r", ()), frame, body_at).get("piece")
        if piece is None or piece.dtype != np.uint8:
            raise DecodeError("a chunk has no bytes")
        partial = self._partial(digest, count, total)
        if partial.pieces[index] is None:
            if partial.held_bytes + piece.nbytes > total:
                self._forget(digest)
                raise DecodeError("the chunks of one message are more bytes than they declare")
            partial.pieces[index] = piece.tobytes()
            partial.held_bytes += piece.nbytes
            partial.missing -= 1
        if partial.missing:
            return envelope, None
        self._forget(digest)
        return envelope, self._joined(partial, digest)

    def give_up_oldest(self) -> None:
        """Forget the message whose first chunk came before all others', where there is one."""
        if self._partials:
            self._forget(next(iter(self._partials)))
            self.given_up += 1

    def _partial(self, digest: str, count: int, total: int) -> _Partial:
        partial = self._partials.get(digest)
        if partial is None:
            partial = self._partials[digest] = _Partial(total, [None] * count, count)
            self.held_bytes += partial.cost_bytes
            while self.held_bytes > self._max_bytes and len(self._partials) > 1:
                self.give_up_oldest()
        elif partial.total_bytes != total or len(partial.pieces) != count:
            raise DecodeError("chunks of one message disagree on its size")
        return partial

    def _forget(self, digest: str) -> None:
        self.held_bytes -= self._partials.pop(digest).cost_bytes

    @staticmethod
    def _placement(entry: object) -> tuple[str, int, int, int]:
        if not isinstance(entry, tuple) or len(entry) < 4:
            raise DecodeError("a chunk does not say where it belongs")
        digest, index, count, total = entry[:4]
        if (
            not isinstance(digest, str)
            or len(digest) != 64
            or not all(type(number) is int for number in (index, count, total))
        ):
            raise DecodeError("a chunk's place is malformed")
        if not (0 <= index < count <= MAX_CHUNKS and 0 < total <= MAX_MESSAGE_BYTES):
            raise LimitExceededError(f"chunk {index} of {count} of a message of {total} bytes is out of bounds")
        return digest, index, count, total

    @staticmethod
    def _joined(partial: _Partial, digest: str) -> bytes:
        whole = b"".join(piece for piece in partial.pieces if piece is not None)
        if len(whole) != partial.total_bytes or hashlib.sha256(whole).hexdigest() != digest:
            raise DecodeError("the joined chunks are not the message that was split")
        return whole
