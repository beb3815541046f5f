from __future__ import annotations

import io

import pytest

from sidestep.worker.outbox import OutboxEntry, StoredEntry, entry
from sidestep.worker.sinks.base import Sink
from sidestep.worker.sinks.console_sink import ConsoleSink

COLLAPSE = "⚠️ MODEL COLLAPSE DETECTED: single_token_dominance+excessive_eos"


def stored(*entries: OutboxEntry) -> list[StoredEntry]:
    return [
        StoredEntry(run_id="run1", position=at, kind=made.kind, row_number=None, payload=made.payload)
        for at, made in enumerate(entries)
    ]


def shown(*entries: OutboxEntry) -> str:
    writer = io.StringIO()
    ConsoleSink(writer).take(stored(*entries))
    return writer.getvalue()


def test_a_notice_is_shown_to_the_letter() -> None:
    assert shown(entry("notice", {"text": COLLAPSE, "level": "critical", "code": "c"})) == f"{COLLAPSE}\n"


def test_a_run_begins_and_ends_with_a_line() -> None:
    lines = shown(
        entry("run", {"run_id": "run1", "project": "digits", "name": "first try"}),
        entry("row", {"loss/total": 1.0}),
        entry("alert", {"id": "i", "title": "t", "text": "x", "level": "warning"}),
        entry("finish", {"exit_code": 0, "reason": ""}),
    )
    assert lines == "sidestep: run first try (run1), project digits\nsidestep: run run1 finished\n"


def test_a_failed_run_says_how() -> None:
    line = shown(entry("finish", {"exit_code": 137, "reason": "no heartbeat for 60 s"}))
    assert line == "sidestep: run run1 failed with exit code 137: no heartbeat for 60 s\n"


def test_a_run_without_a_name_is_called_by_its_id() -> None:
    assert shown(entry("run", {"run_id": "run1", "project": "", "name": ""})) == "sidestep: run run1 (run1)\n"


def test_a_closed_stream_is_counted_and_raises_nothing() -> None:
    writer = io.StringIO()
    sink = ConsoleSink(writer)
    writer.close()
    sink.take(stored(entry("notice", {"text": "one"}), entry("notice", {"text": "two"})))
    assert sink.statistics() == {"shown": 0, "unwritten": 2, "unreadable": 0}


def test_a_broken_pipe_is_counted_and_raises_nothing() -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    sink = ConsoleSink(Gone())
    sink.take(stored(entry("notice", {"text": "one"})))
    assert sink.statistics()["unwritten"] == 1


def test_an_ascii_console_shows_what_it_can() -> None:
    raw = io.BytesIO()
    writer = io.TextIOWrapper(raw, encoding="ascii")
    ConsoleSink(writer).take(stored(entry("notice", {"text": COLLAPSE})))
    assert raw.getvalue() == b"\\u26a0\\ufe0f MODEL COLLAPSE DETECTED: single_token_dominance+excessive_eos\n"
    writer.close()


@pytest.mark.parametrize("payload", [b"not json", b"{}", b"[]"])
def test_an_entry_that_cannot_be_read_is_counted(payload: bytes) -> None:
    sink = ConsoleSink(io.StringIO())
    sink.take([StoredEntry(run_id="run1", position=0, kind="notice", row_number=None, payload=payload)])
    assert sink.statistics()["unreadable"] == 1


def test_it_is_a_sink() -> None:
    sink = ConsoleSink(io.StringIO())
    assert isinstance(sink, Sink)
    assert sink.name == "console"
    sink.close()
    sink.close()
