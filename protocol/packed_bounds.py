"""What a piece of msgpack would make of memory, found by walking over it before anything is unpacked.

The unpacker makes a list as long as the bytes say it is before it has seen one entry, and a thousand of them nested
in each other take a few bytes each. And entries of one byte become objects of sixty. So both, depth and entries, are
counted here first. Integer keys are small ones alone: larger ones could be chosen to fall on one place of a dict.
"""

from __future__ import annotations

import re
from typing import Final

from sidestep.protocol.errors import DecodeError, LimitExceededError

_SCALAR_BYTES: Final = {
    **dict.fromkeys(range(0x80), 1), **dict.fromkeys(range(0xE0, 0x100), 1), 0xC0: 1, 0xC2: 1, 0xC3: 1,
    0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9,
    **{0xA0 + length: 1 + length for length in range(32)},
}  # fmt: skip
_FIXED: Final = tuple(_SCALAR_BYTES.get(byte, 0) for byte in range(256))
"""Bytes of a scalar by its first byte; 0 where that byte does not tell, or begins no scalar."""
_LENGTH_BYTES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""How long the length of a byte string or text is."""
_COUNT_BYTES: Final = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
"""The same for lists and maps."""
_KEYS: Final = frozenset([*range(0x80), *range(0xA0, 0xC0), 0xCC, 0xCD, 0xCE, 0xD9, 0xDA, 0xDB])
"""First bytes of a map's keys: texts, and integers from 0 to 2^32 - 1."""
_MAPS: Final = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
_SMALL: Final = re.compile(rb"[\x00-\x7f\xc0\xc2\xc3\xe0-\xff]+")


def check_packed(packed: bytes | memoryview, *, max_levels: int, max_entries: int) -> None:
    """Return when ``packed`` is one value of at most ``max_levels`` nested containers and ``max_entries`` entries.

    Texts, byte strings and their lengths are stepped over; what is in them is the unpacker's to check.

    Raises:
        LimitExceededError: more than that.
        DecodeError: not one value of msgpack, or one of a form that this protocol does not use.
    """
    packed = bytes(packed)
    try:
        end = _walk(packed, max_levels, max_entries)
    except IndexError:
        end = -1
    if end != len(packed):
        raise DecodeError("not one whole value of msgpack")


def _walk(packed: bytes, max_levels: int, max_entries: int) -> int:
    """Return where the value ends; raises IndexError where it goes on behind the last byte."""
    at, left, is_map, entries = 0, 1, False, 1
    outer: list[tuple[int, bool]] = []
    while left or outer:
        if not left:
            left, is_map = outer.pop()
            continue
        byte = packed[at]
        if is_map and not left % 2 and byte not in _KEYS:
            raise DecodeError("a map's key is neither a text nor a small natural number")
        left -= 1
        size = _FIXED[byte]
        if size:
            at += size
            if size == 1 and left and not is_map:  # a run of the smallest values is one step
                run = _SMALL.match(packed, at, at + left)
                length = run.end() - at if run else 0
                at, left = at + length, left - length
            continue
        at, count, is_container = _step(packed, at)
        if is_container:
            entries += count
            if entries > max_entries or len(outer) >= max_levels:
                raise LimitExceededError(f"more than {max_entries} entries, or nested deeper than {max_levels} levels")
            outer.append((left, is_map))
            left, is_map = count, byte in _MAPS
    return at


def _step(packed: bytes, at: int) -> tuple[int, int, bool]:
    """Return where what follows begins, the entries of a container (a map's keys count too), and whether it is one."""
    byte = packed[at]
    if byte & 0xE0 == 0x80:  # 0x80..0x8f a small map, 0x90..0x9f a small list
        return at + 1, (byte & 0x0F) * (1 if byte & 0x10 else 2), True
    if byte in _LENGTH_BYTES:
        behind = at + 1 + _LENGTH_BYTES[byte]
        return behind + int.from_bytes(packed[at + 1 : behind], "big"), 0, False
    if byte in _COUNT_BYTES:
        behind = at + 1 + _COUNT_BYTES[byte]
        count = int.from_bytes(packed[at + 1 : behind], "big")
        return behind, count * (1 if byte in {0xDC, 0xDD} else 2), True
    raise DecodeError(f"0x{byte:02x} begins no value of this protocol")
