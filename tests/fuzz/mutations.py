"""Frames made from other frames: bytes turned, heads changed as what they are, prefixes kept fitting or not."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from sidestep.protocol.frames import MAGIC
from sidestep.protocol.messages import Kind
from sidestep.protocol.version import WIRE_MAJOR

PREFIX: Final = struct.Struct("<3sBBBHII")
IN_CHUNKS: Final = b"chunks:"
"""Begins what is to be cut into chunks (by the byte that follows) before it is sent."""
NUMBERS: Final = (
    0, 1, -1, 2, 255, 256, 65_535, 65_536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 61) - 1,
    1 << 62, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1,
)  # fmt: skip
TEXTS: Final = ("", "\0", "x" * 129, "../../x", "run", "inc", "\u202e", "object", "O", "float16", "a" * 64, "ä" * 300)
RAW: Final = (
    b"\xdc\xff\xff" * 40, b"\xdd\x00\x01\x00\x00" * 60, b"\xdf\xff\xff\xff\xff", b"\x91" * 300, b"\x81\xa0" * 200,
    b"\x90" * 2_000, b"\xc7\x00\x05", b"\xd4\x01\x00", b"\xc1", b"\xca\x7f\xc0\x00\x00", b"\xcb\x7f\xf0" + bytes(6),
)  # fmt: skip
"""Pieces of msgpack that declare more than they bring, or that this protocol does not use."""


def fitted(kind: int, head: bytes, body: bytes, *, major: int = WIRE_MAJOR, minor: int = 1) -> bytes:
    """Return a frame whose prefix fits its parts."""
    return PREFIX.pack(MAGIC, kind, major, minor, 0, len(head), len(body)) + head + bytes(-len(head) % 8) + body


def parts(frame: bytes) -> tuple[int, bytes, bytes]:
    """Return kind, head and body of a frame as far as they can be told."""
    if len(frame) < PREFIX.size:
        return 0, frame, b""
    _, kind, _, _, _, head_bytes, _ = PREFIX.unpack_from(frame)
    end = PREFIX.size + head_bytes
    return kind, frame[PREFIX.size : end], frame[end + -head_bytes % 8 :]


class Mutator:
    """Makes a frame from a frame; the same seed gives the same frames."""

    def __init__(self, seed: int, corpus: Sequence[bytes]) -> None:
        """Cross frames with those of ``corpus``."""
        self.rng = random.Random(seed)
        self.corpus = corpus

    def mutate(self, frame: bytes) -> bytes:
        """Return another frame, or (see ``IN_CHUNKS``) one that is to be sent in chunks."""
        if self.rng.random() < 0.6:
            frame = self.rng.choice(self.corpus)
        ways: Sequence[Callable[[bytes], bytes]] = (
            self._turn_bytes, self._turn_head, self._other_kind, self._cross, self._raw_head, self._cut,
            *[self._change_head] * 12,
        )  # fmt: skip
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            frame = self.rng.choice(ways)(frame)
        if self.rng.random() < 0.04:
            frame = IN_CHUNKS + bytes([self.rng.randrange(256)]) + frame
        return frame[: 1 << 18]

    def _turned(self, some: bytes) -> bytes:
        made = bytearray(some)
        for _ in range(self.rng.choice((1, 1, 2, 4, 8))):
            if made:
                made[self.rng.randrange(len(made))] = self.rng.choice((0, 1, 0x7F, 0x80, 0xFF, self.rng.randrange(256)))
        return bytes(made)

    def _turn_bytes(self, frame: bytes) -> bytes:
        return self._turned(frame)

    def _turn_head(self, frame: bytes) -> bytes:
        kind, head, body = parts(frame)
        return fitted(kind, self._turned(head), body)

    def _raw_head(self, frame: bytes) -> bytes:
        kind, head, body = parts(frame)
        at = self.rng.randrange(len(head) + 1)
        behind = head[at + self.rng.choice((0, 1, 4)) :] if self.rng.random() < 0.5 else b""
        return fitted(kind, head[:at] + self.rng.choice(RAW) + behind, body)

    def _other_kind(self, frame: bytes) -> bytes:
        _, head, body = parts(frame)
        return fitted(self.rng.choice((*Kind, 30, 99, 255)), head, body, minor=self.rng.choice((0, 1, 2, 255)))

    def _cross(self, frame: bytes) -> bytes:
        kind, head, body = parts(frame)
        other_kind, other_head, other_body = parts(self.rng.choice(self.corpus))
        return self.rng.choice(
            (fitted(kind, head, other_body), fitted(other_kind, head, body), fitted(kind, other_head, body))
        )

    def _cut(self, frame: bytes) -> bytes:
        kind, head, body = parts(frame)
        if self.rng.random() < 0.3:
            return frame[: self.rng.randrange(len(frame) + 1)]
        return fitted(kind, head, body[: self.rng.randrange(len(body) + 1)] + bytes(self.rng.choice((0, 0, 8))))

    def _change_head(self, frame: bytes) -> bytes:
        kind, head, body = parts(frame)
        try:
            value = msgpack.unpackb(head, raw=False, strict_map_key=False)
            packed = msgpack.packb(self._changed(value), use_bin_type=True)
        except Exception:  # noqa: BLE001  (no structure here, or none that can be written: bytes then)
            return self._turn_head(frame)
        return fitted(kind, packed, body)

    def _changed(self, value: Any) -> Any:
        if isinstance(value, dict) and value and self.rng.random() < 0.85:
            made = dict(value)
            key = self.rng.choice(list(made))
            way = self.rng.random()
            if way < 0.1:
                del made[key]
            elif way < 0.2:
                made[self.rng.choice(TEXTS)] = made[key]
            else:
                made[key] = self._changed(made[key])
            return made
        if isinstance(value, list) and value and self.rng.random() < 0.85:
            items = list(value)
            at = self.rng.randrange(len(items))
            way = self.rng.random()
            if way < 0.1:
                del items[at]
            elif way < 0.2:
                items *= self.rng.choice((2, 40))
            else:
                items[at] = self._changed(items[at])
            return items
        return self._leaf(value)

    def _leaf(self, value: Any) -> Any:
        if self.rng.random() < 0.1:
            return self.rng.choice((None, True, 0, 1.5, "", b"", b"x" * 70, [], {}, [[[[]]]], {"a": {"b": [1]}}))
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.rng.choice((*NUMBERS, value + 1, value + 1, value - 1, value * 2))
        if isinstance(value, float):
            return self.rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e308, value * 2))
        if isinstance(value, str):
            return self.rng.choice((*TEXTS, value + "x", value * 2, value[:-1]))
        return self.rng.choice((value, [1], ["losses"], {"losses": 1}, {"losses": [1, 0, 0]}, {"x": {"y": [None]}}))
