"""docs/wire_protocol.md, the code and the recorded frames say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sidestep.protocol import limits
from sidestep.protocol.array_frame import WIRE_DTYPES
from sidestep.protocol.codec import schema
from sidestep.protocol.frames import UnknownMessage, decode, encode, peek
from sidestep.protocol.messages import MESSAGE_TYPES, Kind
from sidestep.protocol.version import WIRE_MAJOR, WIRE_MINOR

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "wire_protocol.md").read_text(encoding="utf-8")
GOLDEN = sorted((ROOT / "tests" / "golden" / "wire").glob("*.frame"))


def document_rows() -> dict[int, tuple[str, tuple[str, ...]]]:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", DOCUMENT, re.MULTILINE)
    return {int(number): (name, tuple(re.findall(r"`(\w+)`", fields))) for number, name, fields in rows}


def test_the_document_names_the_version_of_the_code() -> None:
    assert f"**Wire version {WIRE_MAJOR}.{WIRE_MINOR}.**" in DOCUMENT


def test_the_document_lists_every_kind_with_its_fields() -> None:
    of_code = {
        int(kind): (
            kind.name,
            tuple(field.name for field in schema(MESSAGE_TYPES[kind])) if kind in MESSAGE_TYPES else (),
        )
        for kind in Kind
    }
    assert document_rows() == of_code


def test_the_document_states_the_limits_and_dtypes_of_the_code() -> None:
    for value in (limits.MAX_MESSAGE_BYTES, limits.MAX_HEAD_BYTES, limits.MAX_BLOB_BYTES, limits.CHUNK_BYTES):
        assert f"{value:,}" in DOCUMENT
    for dtype in WIRE_DTYPES:
        assert dtype in DOCUMENT


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_recorded_frames_of_every_released_version_decode(path: Path) -> None:
    frame = path.read_bytes()
    prefix = peek(frame)
    envelope, message = decode(frame)
    assert not isinstance(message, UnknownMessage)
    assert path.stem == f"{prefix.major}.{prefix.minor}-{message.kind.name.lower()}"
    assert (envelope.run_id, envelope.incarnation, envelope.rank) == ("golden-run", "golden-incarnation", 3)
    if (prefix.major, prefix.minor) == (WIRE_MAJOR, WIRE_MINOR):
        assert encode(envelope, message) == frame, "the same message no longer gives the same bytes: raise the version"


def test_every_kind_is_recorded_in_the_current_version() -> None:
    recorded = {path.stem for path in GOLDEN}
    assert {f"{WIRE_MAJOR}.{WIRE_MINOR}-{Kind(kind).name.lower()}" for kind in MESSAGE_TYPES} <= recorded
