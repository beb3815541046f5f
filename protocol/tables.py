"""Tables by hash: what does not change from step to step travels once, as a blob, and is named by its SHA-256.

Layouts are in docs/wire_protocol.md: ``parameters``, ``groups``, ``tokenizer``, ``samples``.
"""

from __future__ import annotations

import hashlib
from typing import cast

import msgpack  # type: ignore[import-untyped]

from sidestep.protocol.errors import DecodeError, EncodeError, LimitExceededError
from sidestep.protocol.limits import MAX_BLOB_BYTES, MAX_NESTING_LEVELS, MAX_TABLE_ENTRIES
from sidestep.protocol.messages import Json
from sidestep.protocol.packed_bounds import check_packed


def encode_table(value: Json) -> bytes:
    """Return ``value`` as msgpack; the same value gives the same bytes.

    Raises:
        EncodeError: something in it has no plain form, or it is larger than ``MAX_BLOB_BYTES``.
    """
    try:
        packed = cast("bytes", msgpack.packb(value, use_bin_type=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise EncodeError(f"a table holds what cannot travel: {error}") from error
    if len(packed) > MAX_BLOB_BYTES:
        raise EncodeError(
            f"a table of {len(packed)} bytes is over the limit of {MAX_BLOB_BYTES}; "
            "pass fewer samples or smaller images"
        )
    return packed


def decode_table(content: bytes) -> Json:
    """Return what ``encode_table`` was given (tuples as lists).

    Raises:
        DecodeError: not msgpack; ``LimitExceededError`` where it is larger, deeper or of more entries than allowed.
    """
    if len(content) > MAX_BLOB_BYTES:
        raise LimitExceededError(f"a table of {len(content)} bytes, more than {MAX_BLOB_BYTES}")
    check_packed(content, max_levels=MAX_NESTING_LEVELS, max_entries=MAX_TABLE_ENTRIES)
    try:
        return msgpack.unpackb(content, raw=False, strict_map_key=False, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise DecodeError(f"a table is not msgpack: {error}") from error


def digest(content: bytes) -> str:
    """Return the SHA-256 of ``content`` in hex."""
    return hashlib.sha256(content).hexdigest()
