"""Bytes that declare more than they bring make nothing: depth, entries and keys are counted before anything is made."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import msgpack  # type: ignore[import-untyped]
import pytest
from tests.fuzz.mutations import fitted

from sidestep.protocol import limits
from sidestep.protocol.errors import DecodeError, LimitExceededError
from sidestep.protocol.frames import decode
from sidestep.protocol.messages import Kind
from sidestep.protocol.packed_bounds import check_packed
from sidestep.protocol.tables import decode_table, encode_table


@contextmanager
def allocating_at_most(mebibytes: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < mebibytes * (1 << 20), f"{peak / (1 << 20):.1f} MiB were allocated"


NESTED_LISTS = b"\xdd\x00\x00\xff\xff" * 800
"""800 lists in each other, each of which says that it has 65,535 entries: 400 MiB if they were made."""


def test_lists_that_are_only_declared_are_not_made() -> None:
    with allocating_at_most(1.0), pytest.raises(LimitExceededError):
        decode(fitted(Kind.HELLO, NESTED_LISTS, b""))


@pytest.mark.parametrize("head_bytes", [200, 600, 1_024, 1_025, 4_000])
def test_a_small_head_makes_little_however_deep(head_bytes: int) -> None:
    head = (b"\xdc" + head_bytes.to_bytes(2, "big")) * (head_bytes // 3)
    with allocating_at_most(4.0), pytest.raises(DecodeError):
        decode(fitted(Kind.HELLO, head + bytes(head_bytes - len(head)), b""))


def test_entries_of_one_byte_do_not_become_objects_beyond_the_limit() -> None:
    head = b"\x81\xa1f" + b"\xdc\x00\x3f" + (b"\xdd\x00\x00\xff\xff" + b"\x80" * 65_535) * 63
    assert len(head) < limits.MAX_HEAD_BYTES
    with allocating_at_most(2 * len(head) / (1 << 20) + 1), pytest.raises(LimitExceededError, match="entries"):
        decode(fitted(Kind.HELLO, head, b""))


@pytest.mark.parametrize(
    "content",
    [
        NESTED_LISTS,
        b"\xdd\x02\xff\xff\xff" * 1_000,
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\x90\x01",  # a list as a key: no dict takes it
        b"\x81\xc0\x01",
        b"\x81\xcb" + bytes(8) + b"\x01",  # a float as a key
        b"\x81\xcf" + b"\xff" * 8 + b"\x01",  # a key of 64 bits
        b"\x81\xff\x01",
        b"\xc7\x00\x05",
        b"\xd4\x01\x00",
        b"\xc1",
        b"",
        b"\x01\x02",
        b"\xa5abc",
        b"\xc6\xff\xff\xff\xff",
        b"\xa1\xff",  # no UTF-8
    ],
)
def test_a_table_of_another_form_is_refused(content: bytes) -> None:
    with allocating_at_most(1.0), pytest.raises(DecodeError):
        decode_table(content)


def test_keys_that_would_fall_on_one_place_of_a_dict_are_refused_at_once() -> None:
    one_place = [number * ((1 << 61) - 1) for number in range(1, 8)]
    content = b"\xdf" + (100_000).to_bytes(4, "big")
    content += b"".join(b"\xcf" + one_place[at % 7].to_bytes(8, "big") + b"\x01" for at in range(100_000))
    began = time.process_time()
    with pytest.raises(DecodeError, match="key"):
        decode_table(content)
    assert time.process_time() - began < 1.0


def test_a_table_over_its_limit_is_refused() -> None:
    with pytest.raises(LimitExceededError, match="bytes"):
        decode_table(bytes(limits.MAX_BLOB_BYTES + 1))
    with pytest.raises(LimitExceededError, match="entries"):
        decode_table(msgpack.packb([[0] * 65_535] * 65))


def test_tables_come_back_as_they_were() -> None:
    table = {
        "texts": {number: f"token {number}" for number in (0, 127, 128, 65_536, (1 << 32) - 1)},
        "parameters": [{"name": "w" * 300, "shape": [3, -4, 1 << 40], "trainable": True, "group": None}] * 3,
        "images": [{"shape": [2, 2, 3], "pixels": bytes(70_000)}, 1.5, [], {}],
    }
    assert decode_table(encode_table(table)) == table


def test_nothing_is_said_against_what_is_within_bounds() -> None:
    packed = msgpack.packb({"a": [1, 2, {"b": [-1, None, True, 2.5, b"x" * 300, "y" * 70_000, list(range(500))]}]})
    check_packed(packed, max_levels=5, max_entries=600)
    for bounds in ({"max_levels": 4, "max_entries": 600}, {"max_levels": 5, "max_entries": 500}):
        with pytest.raises(LimitExceededError):
            check_packed(packed, **bounds)
