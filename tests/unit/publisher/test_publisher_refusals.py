"""A link that is refused, at a clock that the test sets: what the console is told, in which order, and how often."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Hello
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.conversation import Conversation
from sidestep.trainer_hooks.delivery import Delivery
from sidestep.trainer_hooks.link import Link
from sidestep.trainer_hooks.refusals import Handshake

WARNING_SECONDS = 10.0
ROUND_SECONDS = 0.2
HANDSHAKE_SECONDS = 0.5


class Refusing:
    """Connections to a worker that never answers but by the ends of handshakes, from ``since`` on."""

    def __init__(self, outcome: Handshake, *, since: float) -> None:
        self.now = self._connected_at = 0.0
        self._outcome, self._since = outcome, since

    def connect(self) -> Refusing:
        self._connected_at = self.now
        return self

    def receive(self) -> bytes | None:
        return None

    def send(self, frame: bytes) -> bool:
        return True

    def handshakes(self) -> list[Handshake]:
        is_ended = self.now >= max(self._since, self._connected_at + HANDSHAKE_SECONDS)
        return [self._outcome] if is_ended else []

    def close(self) -> None:
        pass


@pytest.fixture
def told() -> Callable[..., tuple[list[str], int]]:
    """Return what a link has told of a worker, and how often it was refused, after so long."""

    def tell(
        outcome: Handshake, *, since: float = 0.0, has_keys: bool = False, until: float = 100.0
    ) -> tuple[list[str], int]:
        lines: list[str] = []
        console = Console(lines.append)
        delivery = Delivery(Envelope(run_id="run", incarnation="one", rank=0))
        conversation = Conversation(
            delivery, Hello(project="p"), {}, console=console, on_command=lambda _command: None, now=0.0
        )
        worker = Refusing(outcome, since=since)
        link = Link(worker, conversation, address="tcp://w:1", console=console, has_keys=has_keys)
        while worker.now < until:
            link.tick(worker.now, is_rounds_turn=True)
            worker.now += ROUND_SECONDS
        return lines, link.num_handshake_failures

    return tell


@pytest.mark.parametrize(
    ("outcome", "has_keys", "words"),
    [
        (Handshake.MISMATCH, False, "this trainer has no keys"),
        (Handshake.UNKNOWN_KEY, True, "does not know this trainer's key"),
        (Handshake.DROPPED, True, "breaks off the handshake"),
    ],
)
def test_who_is_refused_at_once_is_told_that_alone(
    told: Callable[..., tuple[list[str], int]], outcome: Handshake, has_keys: bool, words: str
) -> None:
    lines, num_failures = told(outcome, has_keys=has_keys)
    assert len(lines) == 1, lines
    assert words in lines[0]
    assert 4 <= num_failures <= 8, "it has tried again, ever less often"


def test_who_heard_of_no_worker_first_is_told_what_is_wrong_as_soon_as_that_is_known(
    told: Callable[..., tuple[list[str], int]],
) -> None:
    (alone,), _ = told(Handshake.MISMATCH, since=WARNING_SECONDS + 5, until=WARNING_SECONDS + 4)
    assert "no worker answers at tcp://w:1" in alone
    lines, _ = told(Handshake.MISMATCH, since=WARNING_SECONDS + 5)
    assert lines[0] == alone
    assert len(lines) == 2, lines
    assert "this trainer has no keys" in lines[1]


def test_who_is_hung_up_on_without_keys_is_told_of_them_and_not_that_nobody_answers(
    told: Callable[..., tuple[list[str], int]],
) -> None:
    """A worker with keys does so too: which of the two hears the other out first is chance."""
    lines, _ = told(Handshake.DROPPED, until=WARNING_SECONDS)
    assert lines == [], "it may still be a worker that comes or goes"
    lines, num_failures = told(Handshake.DROPPED)
    assert num_failures == 0, "the socket tries again by itself"
    assert len(lines) == 1, lines
    assert "refuses the handshake: this trainer has no keys" in lines[0]


def test_a_handshake_that_breaks_off_now_and_then_proves_nothing(told: Callable[..., tuple[list[str], int]]) -> None:
    lines, _ = told(Handshake.DROPPED, since=99.5)  # the last three rounds
    assert len(lines) == 1, lines
    assert "no worker answers" in lines[0]
