"""Frames: round trips, strictness, limits before allocation, versions, chunks."""

from __future__ import annotations

import struct
from enum import IntEnum, StrEnum
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest

from sidestep.protocol import limits
from sidestep.protocol.errors import DecodeError, EncodeError, IncompatibleWireError, LimitExceededError, ProtocolError
from sidestep.protocol.frames import MAGIC, ChunkJoiner, Envelope, UnknownMessage, decode, encode, peek, split
from sidestep.protocol.messages import Blob, Hello, Kind, LearningRates, Losses, Scalars, StepEnd
from sidestep.protocol.version import WIRE_MAJOR, WIRE_MINOR

ENVELOPE = Envelope(run_id="run", incarnation="inc", rank=2, sequence=9, accounts={"losses": (5, 1, 0)})


def forged(
    head: Any, body: bytes = b"", *, kind: int = Kind.STEP_END, major: int = WIRE_MAJOR, minor: int = WIRE_MINOR
) -> bytes:
    packed = head if isinstance(head, bytes) else msgpack.packb(head)
    prefix = struct.pack("<3sBBBHII", MAGIC, kind, major, minor, 0, len(packed), len(body))
    return prefix + packed + bytes(-len(packed) % 8) + body


def forged_losses(description: Any, body: bytes) -> bytes:
    head = {"e": ["run", "inc", 0, 1], "f": {"step": 1, "microstep": 0, "labelled": 1}, "r": [description]}
    return forged(head, body, kind=Kind.LOSSES)


def test_a_message_comes_back_as_it_was_said() -> None:
    message = Losses(
        step=3,
        microstep=1,
        labelled=2,
        losses=np.array([np.nan, 1.5], np.float32),
        target_ids=np.array([7, 8], np.int32),
    )
    envelope, back = decode(encode(ENVELOPE, message))
    assert envelope == ENVELOPE
    assert isinstance(back, Losses)
    np.testing.assert_array_equal(back.losses, message.losses)
    np.testing.assert_array_equal(back.target_ids, message.target_ids)
    assert (back.step, back.microstep, back.labelled, back.contexts.shape) == (3, 1, 2, (0, 0))


def test_decoded_arrays_are_views_that_cannot_be_written() -> None:
    _, back = decode(encode(ENVELOPE, LearningRates(step=1, rates=np.array([0.5]))))
    assert isinstance(back, LearningRates)
    with pytest.raises(ValueError, match="read-only"):
        back.rates[0] = 1.0


@pytest.mark.parametrize(
    ("rates", "what"),
    [
        (np.zeros(2, np.float32), "float32"),
        (np.zeros((1, 2)), "2 axes"),
        ([0.5], "list"),
        (np.array([object()]), "object"),
    ],
)
def test_an_array_of_another_form_is_not_encoded(rates: Any, what: str) -> None:
    with pytest.raises(EncodeError, match=what):
        encode(ENVELOPE, LearningRates(step=1, rates=rates))


@pytest.mark.parametrize(
    "values",
    [{"x": object()}, {1: "x"}, {"x": 1 << 70}, {"x": {"y": {1, 2}}}, {"x": "a" * (limits.MAX_TEXT_BYTES + 1)}],
)
def test_values_without_a_plain_form_are_not_encoded(values: Any) -> None:
    with pytest.raises(EncodeError, match="Scalars"):
        encode(ENVELOPE, Scalars(step=1, values=values))


class Wish(StrEnum):
    ONE = "one"


class Number(IntEnum):
    TWO = 2


def test_enums_and_numpy_floats_travel_as_what_they_are() -> None:
    said = Hello(
        tags=(Wish.ONE,), start_step=Number.TWO, run_config={"a": Wish.ONE, "b": np.float64(0.5), "c": Number.TWO}
    )
    _, back = decode(encode(ENVELOPE, said))
    assert back == Hello(tags=("one",), start_step=2, run_config={"a": "one", "b": 0.5, "c": 2})


def test_numbers_that_are_not_finite_may_travel() -> None:
    _, back = decode(encode(ENVELOPE, Scalars(step=1, values={"a": float("nan"), "b": float("-inf")})))
    assert isinstance(back, Scalars)
    assert back.values["b"] == float("-inf")
    assert back.values["a"] != back.values["a"]  # only NaN differs from itself


def test_a_head_that_is_too_large_says_what_to_shorten() -> None:
    config = {str(i): "x" * 100_000 for i in range(50)}
    with pytest.raises(EncodeError, match="shorten the configuration"):
        encode(ENVELOPE, Hello(run_config=config))


@pytest.mark.parametrize("cut", [0, 3, 15, 16, 40, -1])
def test_a_torn_frame_is_refused(cut: int) -> None:
    frame = encode(ENVELOPE, StepEnd(step=1, unix_time=2.0))
    with pytest.raises(DecodeError):
        decode(frame[:cut])


def test_bytes_behind_a_frame_are_refused() -> None:
    with pytest.raises(DecodeError, match="arrived"):
        decode(encode(ENVELOPE, StepEnd(step=1, unix_time=2.0)) + b"\0")


def test_another_major_version_is_told_apart_from_rubbish() -> None:
    frame = forged({}, major=WIRE_MAJOR + 1, minor=7)
    assert peek(frame).major == WIRE_MAJOR + 1
    with pytest.raises(IncompatibleWireError) as caught:
        decode(frame)
    assert (caught.value.major, caught.value.minor) == (WIRE_MAJOR + 1, 7)
    with pytest.raises(DecodeError, match="magic"):
        decode(b"GET / HTTP/1.1\r\n\r\n")


def test_a_kind_of_a_later_minor_version_is_kept_apart() -> None:
    frame = forged({"e": ["run", "inc", 0, 4], "f": {"anything": 1}}, kind=29, minor=WIRE_MINOR + 3)
    envelope, message = decode(frame)
    assert envelope.sequence == 4
    assert message == UnknownMessage(kind=29)


def test_unknown_fields_are_skipped_and_missing_ones_take_their_default() -> None:
    head = {"e": ["run", "inc", 0, 1, "later"], "f": {"step": 5, "unix_time": 1.0, "of_a_later_version": [1, {"a": 2}]}}
    _, message = decode(forged(head))
    assert message == StepEnd(step=5, unix_time=1.0)


@pytest.mark.parametrize(
    "head",
    [
        {"f": {"step": 5, "unix_time": 1.0}},
        {"e": ["run", "inc", 0], "f": {}},
        {"e": ["run", "inc", -1, 1], "f": {"step": 5, "unix_time": 1.0}},
        {"e": ["r" * 500, "inc", 0, 1], "f": {"step": 5, "unix_time": 1.0}},
        {"e": ["run", "inc", 0, 1], "f": {"step": 5}},
        {"e": ["run", "inc", 0, 1], "f": {"step": "5", "unix_time": 1.0}},
        {"e": ["run", "inc", 0, 1], "f": {"step": True, "unix_time": 1.0}},
        {"e": ["run", "inc", 0, 1], "f": {"step": 5, "unix_time": 1.0, "due": "tokens"}},
        {"e": ["run", "inc", 0, 1], "f": {"step": 5, "unix_time": 1.0, "sent": {"losses": "1"}}},
        {"e": ["run", "inc", 0, 1], "f": [1], "a": {}},
        {"e": ["run", "inc", 0, 1], "f": {"step": 5, "unix_time": 1.0}, "a": {"losses": [1, 2]}},
        [1, 2],
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x81" * 2_000,
    ],
)
def test_a_head_of_another_form_is_refused(head: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(forged(head))


@pytest.mark.parametrize(
    "description",
    [
        ["losses", "float32", [1 << 40]],
        ["losses", "float32", [1 << 20, 1 << 20, 1 << 20]],
        ["losses", "float32", [0, 1, 1, 1, 1]],
        ["losses", "float32", [-1]],
        ["losses", "float32", [1.0]],
        ["losses", "float64", [1]],
        ["losses", "object", [1]],
        ["losses", "O", [1]],
        ["losses", "float32", [3]],
        ["losses", "float32", [1, 1]],
        ["losses", "float32"],
        "losses",
    ],
)
def test_an_array_is_not_made_of_what_does_not_fit(description: Any) -> None:
    with pytest.raises(DecodeError):
        decode(forged_losses(description, bytes(8)))


def test_too_many_arrays_are_refused() -> None:
    head = {"e": ["run", "inc", 0, 1], "f": {}, "r": [[str(i), "uint8", [0]] for i in range(limits.MAX_ARRAYS + 1)]}
    with pytest.raises(LimitExceededError):
        decode(forged(head, kind=Kind.LOSSES))


def test_a_declared_head_over_the_limit_is_refused_unread() -> None:
    frame = struct.pack("<3sBBBHII", MAGIC, Kind.HELLO, WIRE_MAJOR, 0, 0, limits.MAX_HEAD_BYTES + 1, 0)
    with pytest.raises(LimitExceededError, match="head"):
        decode(frame)


def test_a_large_message_travels_in_chunks_in_any_order() -> None:
    blob = Blob(digest="d" * 64, content=bytes(range(256)) * 4_000)
    frame = encode(ENVELOPE, blob)
    chunks = split(ENVELOPE, frame)
    assert len(chunks) == 4
    assert all(len(chunk) <= limits.MAX_FRAME_BYTES and peek(chunk).kind == Kind.CHUNK for chunk in chunks)
    joiner = ChunkJoiner()
    assert [joiner.add(chunk)[1] for chunk in (chunks[2], chunks[0], chunks[0], chunks[3])] == [None] * 4
    envelope, whole = joiner.add(chunks[1])
    assert envelope.sequence == ENVELOPE.sequence
    assert whole is not None
    assert decode(whole)[1] == blob
    assert joiner.held_bytes == 0


def test_a_small_message_is_not_split() -> None:
    frame = encode(ENVELOPE, StepEnd(step=1, unix_time=0.0))
    assert split(ENVELOPE, frame) == [frame]


def test_a_chunk_alone_is_not_a_message() -> None:
    chunk = split(ENVELOPE, encode(ENVELOPE, Blob(digest="d", content=bytes(1 << 20))))[0]
    with pytest.raises(DecodeError, match="chunk"):
        decode(chunk)


def test_a_joiner_stays_within_its_bytes_and_counts_what_it_gave_up() -> None:
    joiner = ChunkJoiner(max_bytes=1 << 20)
    for i in range(4):
        frame = encode(ENVELOPE, Blob(digest=str(i), content=bytes([i]) * 400_000))
        joiner.add(split(ENVELOPE, frame)[0])
    assert joiner.held_bytes <= 1 << 20
    assert joiner.given_up == 2


def test_a_forged_chunk_is_refused() -> None:
    frame = encode(ENVELOPE, Blob(digest="d", content=bytes(300_000)))
    first, second = split(ENVELOPE, frame)
    tampered = second[:-8] + bytes([1]) * 8
    joiner = ChunkJoiner()
    joiner.add(first)
    with pytest.raises(DecodeError, match="not the message"):
        joiner.add(tampered)
    for place in (["x", 0, 2, 10], ["d" * 64, 2, 2, 10], ["d" * 64, 0, 1 << 30, 10], ["d" * 64, 0, 1, 1 << 40], None):
        head = {"e": ["run", "inc", 0, 1], "c": place, "r": [["piece", "uint8", [8]]]}
        with pytest.raises(DecodeError):
            joiner.add(forged(head, bytes(8), kind=Kind.CHUNK))


def chunk_of(index: int, count: int, total: int, piece: bytes, digest: str = "d" * 64) -> bytes:
    padded = piece + bytes(-len(piece) % 8)
    head = {"e": ["run", "inc", 0, 1], "c": [digest, index, count, total], "r": [["piece", "uint8", [len(piece)]]]}
    return forged(head, padded, kind=Kind.CHUNK)


def test_chunks_bring_no_more_bytes_than_they_declare() -> None:
    joiner = ChunkJoiner()
    joiner.add(chunk_of(0, 200, 1_000, bytes(900)))
    with pytest.raises(DecodeError, match="more bytes"):
        joiner.add(chunk_of(1, 200, 1_000, bytes(900)))
    assert joiner.held_bytes == 0


def test_messages_of_which_little_is_declared_are_not_kept_without_end() -> None:
    joiner = ChunkJoiner(max_bytes=1 << 20)
    for number in range(2_000):
        joiner.add(chunk_of(0, 256, 1, b"x", f"{number:064d}"))
    assert joiner.held_bytes <= 1 << 20
    assert joiner.given_up > 1_000


def test_a_whole_message_is_no_chunk() -> None:
    with pytest.raises(DecodeError, match="no chunk"):
        ChunkJoiner().add(encode(ENVELOPE, StepEnd(step=1, unix_time=0.0)))


@pytest.mark.parametrize(
    "accounts",
    [
        {"losses": [1, -1, 0]},
        {"losses": [1, 0, 1 << 63]},
        {"losses": [1, 0, True]},
        {"x" * 200: [1, 0, 0]},
        {f"kind-{number}": [1, 0, 0] for number in range(limits.MAX_ACCOUNTS + 1)},
        [1],
    ],
)
def test_accounts_that_are_none_are_refused(accounts: Any) -> None:
    with pytest.raises(DecodeError):
        decode(forged({"e": ["run", "inc", 0, 1], "f": {"step": 5, "unix_time": 1.0}, "a": accounts}))


def test_an_extension_of_msgpack_is_no_value() -> None:
    head = msgpack.packb({"e": ["run", "inc", 0, 1], "f": {"step": 5, "unix_time": 1.0, "later": 0}})
    with pytest.raises(DecodeError, match="extension"):
        decode(forged(head[:-1] + b"\xc7\x00\x05"))


def test_a_value_as_deep_as_may_be_sent_comes_back_whatever_the_heads_length() -> None:
    value: Any = []
    for _ in range(limits.MAX_NESTING_LEVELS):
        value = [value]
    for filling in ("", "x" * 3_000):
        message = Scalars(step=1, values={"deep": value, "filling": filling})
        assert decode(encode(ENVELOPE, message))[1] == message
