"""No bytes whatever make the decoder raise anything but its own errors."""

from __future__ import annotations

import contextlib

from hypothesis import example, given
from hypothesis import strategies as st

from sidestep.protocol.errors import ProtocolError
from sidestep.protocol.frames import MAGIC, ChunkJoiner, Envelope, decode, encode
from sidestep.protocol.messages import Notice, Scalars

FRAME = encode(Envelope(run_id="run", incarnation="inc", rank=0, sequence=1), Notice(text="a line", code="c"))
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200))
@example(MAGIC + bytes(13))
def test_random_bytes_are_refused_and_nothing_else_happens(noise: bytes) -> None:
    for frame in (noise, FRAME[:16] + noise):
        with contextlib.suppress(ProtocolError):
            decode(frame)
        with contextlib.suppress(ProtocolError):
            ChunkJoiner().add(frame)


@given(st.lists(st.tuples(st.integers(0, len(FRAME) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_frame_decodes_or_is_refused(flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(FRAME)
    for at, value in flips:
        damaged[at] = value
    with contextlib.suppress(ProtocolError):
        decode(bytes(damaged))


@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=5))
def test_plain_values_come_back_as_they_were(values: dict[str, object]) -> None:
    message = Scalars(step=1, values=values)
    assert decode(encode(Envelope(run_id="r", incarnation="i", rank=0, sequence=1), message))[1] == message
