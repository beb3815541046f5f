from __future__ import annotations

import pytest
from tests.support.wire_trainer import make_hello

from sidestep.protocol.frames import Envelope
from sidestep.protocol.limits import MAX_RANKS, MAX_TABLES
from sidestep.worker.intake import admission
from sidestep.worker.intake.admission import is_within, why_not
from sidestep.worker.intake.decisions import Incarnation

KNOWN = {
    "inc": Incarnation(incarnation="inc", run_id="run", attempt=0, first_seen=0.0, world_size=4, start_step=0),
}
DIGEST = "a" * 64


def envelope(run_id: str = "run", incarnation: str = "inc", rank: int = 0) -> Envelope:
    return Envelope(run_id=run_id, incarnation=incarnation, rank=rank)


def test_a_trainers_stream_is_let_in() -> None:
    assert why_not(envelope(rank=3), make_hello(world_size=4), KNOWN, 1) == ""
    assert why_not(envelope("größer_1-2.3 a", "new", 7), make_hello(world_size=8), KNOWN, 1) == ""


@pytest.mark.parametrize(
    "run_id", ["", "../x", "a/b", "a\\b", ".hidden", "..", "a\0b", "a\nb", "a?b", "a#b", "a%2fb", "C:x", "ä" * 65]
)
def test_a_run_id_that_would_be_a_path_is_not(run_id: str) -> None:
    assert "run id" in why_not(envelope(run_id, "new"), make_hello(), KNOWN, 0)


@pytest.mark.parametrize(
    ("said", "hello", "what"),
    [
        (envelope(incarnation=""), {}, "no name"),
        (envelope("another"), {}, "another run"),
        (envelope(rank=4), {"world_size": 9}, "rank"),
        (envelope(incarnation="new", rank=1), {"world_size": 1}, "rank"),
        (envelope(incarnation="new"), {"world_size": MAX_RANKS + 1}, "limit"),
        (envelope(incarnation="new"), {"world_size": (1 << 62)}, "limit"),
        (envelope(incarnation="new"), {"tables": {"x": "no digest"}}, "digests"),
        (envelope(incarnation="new"), {"tables": {str(at): DIGEST for at in range(MAX_TABLES + 1)}}, "digests"),
    ],
)
def test_what_no_trainer_is_is_told_why(said: Envelope, hello: dict[str, object], what: str) -> None:
    assert what in why_not(said, make_hello(**hello), KNOWN, 0)


def test_a_journal_holds_so_many_attempts_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_INCARNATIONS", 1)
    monkeypatch.setattr(admission, "MAX_STREAMS", 3)
    assert "attempts" in why_not(envelope(incarnation="new"), make_hello(), KNOWN, 0)
    assert why_not(envelope(rank=1), make_hello(), KNOWN, 2) == ""
    assert "streams" in why_not(envelope(rank=1), make_hello(), KNOWN, 3)


def test_messages_belong_to_their_incarnations_run_and_ranks() -> None:
    assert is_within(envelope(rank=3), KNOWN)
    assert not any(is_within(each, KNOWN) for each in (envelope(rank=4), envelope("other"), envelope(incarnation="x")))
