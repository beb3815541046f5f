"""The talk on a connection, without a socket and with a clock of its own."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from sidestep.protocol import frames
from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import (
    Ack,
    Blob,
    Command,
    Heartbeat,
    Hello,
    Message,
    NoAck,
    Notice,
    Refuse,
    Reject,
    StepEnd,
    Welcome,
)
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.conversation import Conversation, Patience
from sidestep.trainer_hooks.delivery import Delivery

IDENTITY = Envelope(run_id="run", incarnation="one", rank=0)
TABLE = b"table" * 100
DIGEST = hashlib.sha256(TABLE).hexdigest()


class Talk:
    """A conversation at a time that the test sets."""

    def __init__(self, **settings: Any) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.commands: list[Command] = []
        self.delivery = Delivery(IDENTITY)
        self.conversation = Conversation(
            self.delivery,
            Hello(project="p"),
            {DIGEST: TABLE},
            console=Console(self.lines.append),
            on_command=self.commands.append,
            now=self.now,
            **settings,
        )
        self.conversation.opened(self.now)

    def hears(self, message: Message) -> None:
        self.conversation.received(frames.encode(IDENTITY, message), self.now)

    def says(self) -> list[Message]:
        said: list[Message] = []
        while (frame := self.conversation.next_frame(self.now)) is not None:
            message = frames.decode(frame)[1]
            assert isinstance(message, Message)
            said.append(message)
            self.conversation.frame_sent()
        return said

    def kinds(self) -> list[str]:
        return [message.kind.name for message in self.says()]


def ranges(*pairs: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(pairs, np.int64).reshape(-1, 2)


def end(step: int) -> StepEnd:
    return StepEnd(step=step, unix_time=0.0)


def test_hello_first_and_nothing_else_before_the_welcome() -> None:
    talk = Talk()
    talk.delivery.take(end(1))
    assert talk.kinds() == ["HELLO"]
    talk.hears(Welcome(instance="a", hello_known=True, wanted=(DIGEST, "0" * 64)))
    talk.now += 0.1
    assert talk.kinds() == ["HEARTBEAT", "BLOB", "STEP_END"]


def test_a_new_instance_gets_what_its_journal_lacks_in_order() -> None:
    talk = Talk()
    for step in range(5):
        talk.delivery.take(end(step))
    talk.hears(Welcome(instance="a", hello_known=True))
    talk.says()
    talk.hears(Ack(committed=ranges((1, 1))))
    talk.now += 60
    talk.hears(Welcome(instance="b", committed=ranges((1, 2), (4, 4))))
    said = talk.says()
    assert [m.kind.name for m in said] == ["HELLO", "HEARTBEAT", "STEP_END", "STEP_END"]
    assert [m.step for m in said if isinstance(m, StepEnd)] == [2, 4]


def test_a_blob_is_sent_again_only_when_it_is_missed_for_long() -> None:
    talk = Talk()
    talk.hears(Welcome(instance="a", hello_known=True, wanted=(DIGEST,)))
    assert [m.digest for m in talk.says() if isinstance(m, Blob)] == [DIGEST]
    talk.hears(Ack(committed=ranges(), wanted=(DIGEST,)))
    assert "BLOB" not in talk.kinds()
    talk.now += 11
    talk.hears(Ack(committed=ranges(), wanted=(DIGEST,)))
    assert "BLOB" in talk.kinds()


def test_heartbeats_keep_their_time_and_carry_the_newest_step() -> None:
    talk = Talk()
    talk.hears(Welcome(instance="a", hello_known=True))
    talk.conversation.newest_step = 12
    talk.says()
    talk.now += 1.9
    assert talk.says() == []
    talk.now += 0.2
    assert talk.says() == [Heartbeat(newest_step=12)]


def test_silence_with_something_unacked_asks_for_a_new_connection() -> None:
    talk = Talk()
    talk.hears(Welcome(instance="a", hello_known=True))
    talk.now += 100
    talk.says()
    assert not talk.conversation.wants_new_connection(talk.now), "an empty window waits for nothing"
    talk.delivery.take(end(1))
    talk.says()
    talk.now += 14
    assert not talk.conversation.wants_new_connection(talk.now)
    talk.now += 2
    assert talk.conversation.wants_new_connection(talk.now)
    talk.hears(Ack(committed=ranges((1, 1))))
    assert not talk.conversation.wants_new_connection(talk.now)


def test_a_worker_that_cannot_store_is_given_a_rest() -> None:
    talk = Talk()
    talk.hears(Welcome(instance="a", hello_known=True))
    talk.delivery.take(end(1))
    talk.says()
    for _ in range(3):
        talk.hears(NoAck(reason="disk full"))
    talk.delivery.take(end(2))
    assert "STEP_END" not in talk.kinds()
    assert talk.lines == ["sidestep: the worker cannot store what it gets: disk full\n"]
    talk.hears(Ack(committed=ranges((1, 1))))
    assert "STEP_END" in talk.kinds()


def test_what_is_left_to_send_is_known_repeats_and_tables_included() -> None:
    talk = Talk()
    assert talk.conversation.has_more(talk.now), "Hello"
    talk.says()
    for step in range(3):
        talk.delivery.take(end(step))
    assert not talk.conversation.has_more(talk.now), "nothing may leave before the Welcome"
    talk.hears(Welcome(instance="a", hello_known=True))
    assert talk.conversation.has_more(talk.now)
    talk.says()
    assert not talk.conversation.has_more(talk.now), "all is on its way"
    talk.hears(Welcome(instance="b", hello_known=True))
    assert talk.conversation.has_more(talk.now), "all of it again"
    talk.says()
    talk.hears(Ack(committed=ranges((1, 3)), wanted=(DIGEST,)))
    assert talk.conversation.has_more(talk.now), "a table"
    talk.says()
    talk.delivery.take(end(3))
    talk.hears(NoAck(reason="disk full"))
    assert not talk.conversation.has_more(talk.now), "the worker rests"
    talk.now += 16
    assert talk.conversation.has_more(talk.now)


def test_only_an_answer_that_is_owed_counts_as_silence() -> None:
    talk = Talk()
    talk.now += 12
    assert talk.conversation.silent_seconds(talk.now) == 12, "nobody has ever answered"
    talk.hears(Welcome(instance="a", hello_known=True))
    talk.says()
    talk.now += 60
    assert talk.conversation.silent_seconds(talk.now) == 0, "a step of a minute owes nothing"
    talk.delivery.take(end(1))
    talk.says()
    talk.now += 7
    assert talk.conversation.silent_seconds(talk.now) == 7
    talk.hears(Ack(committed=ranges((1, 1))))
    assert talk.conversation.silent_seconds(talk.now) == 0
    talk.now += 3
    talk.conversation.opened(talk.now)
    assert talk.conversation.silent_seconds(talk.now) == 3, "another connection, and no Welcome yet"


def test_reject_ends_the_talk_and_is_said_once() -> None:
    talk = Talk()
    for _ in range(2):
        talk.hears(Reject(reason="wire 1.0, not 2.0."))
    talk.delivery.take(end(1))
    assert talk.says() == []
    assert talk.conversation.rejected
    assert talk.lines == [
        "sidestep: the worker refuses this trainer: wire 1.0, not 2.0. Training goes on without it.\n"
    ]


def test_a_refused_message_is_counted_and_forgotten() -> None:
    talk = Talk()
    talk.hears(Welcome(instance="a", hello_known=True))
    talk.delivery.take(end(1))
    talk.says()
    talk.hears(Refuse(sequence=1, reason="malformed"))
    talk.hears(Refuse(sequence=99, reason="malformed"))
    assert [account.refused for account in talk.delivery.accounts().values()] == [1]
    assert talk.delivery.num_unacked == 0


def test_notices_are_shown_exactly_and_commands_are_kept() -> None:
    talk = Talk()
    talk.hears(Notice(text="⚠️ MODEL COLLAPSE DETECTED: single_token_dominance"))
    command = Command(action="stop", command_id="1", at_step=4)
    talk.hears(command)
    assert talk.lines == ["\n⚠️ MODEL COLLAPSE DETECTED: single_token_dominance\n"], "a line of its own"
    assert talk.commands == [command]


@pytest.mark.parametrize("frame", [b"", b"SST", b"\x00" * 64, frames.encode(IDENTITY, Notice(text="x"))[:-3]])
def test_what_is_not_a_message_is_counted_and_changes_nothing(frame: bytes) -> None:
    talk = Talk()
    talk.conversation.received(frame, talk.now)
    assert talk.conversation.num_undecodable == 1
    assert talk.kinds() == ["HELLO"]


def test_nonsense_in_a_message_is_counted_too() -> None:
    talk = Talk()
    talk.hears(Welcome(instance="a", hello_known=True))
    talk.delivery.take(end(1))
    talk.says()
    talk.hears(Ack(committed=ranges((5, 1))))
    talk.hears(Hello())
    assert talk.conversation.num_undecodable == 2
    assert talk.delivery.num_unacked == 1


def test_a_trainer_without_worker_says_so_once() -> None:
    talk = Talk()
    talk.conversation.warn_if_alone(talk.now + 9, "ipc:///w")
    assert talk.lines == []
    for later in (11, 12):
        talk.conversation.warn_if_alone(talk.now + later, "ipc:///w")
    assert len(talk.lines) == 1
    assert "no worker answers at ipc:///w" in talk.lines[0]


def test_a_worker_that_falls_silent_is_said_once() -> None:
    talk = Talk()
    talk.hears(Welcome(instance="a", hello_known=True))
    talk.delivery.take(end(1))
    talk.says()
    for _ in range(8):
        talk.now += 10
        talk.conversation.warn_if_alone(talk.now, "ipc:///w")
        assert len(talk.lines) == (talk.now - 100 > 40)
    assert "the worker at ipc:///w has stored nothing for 40 s" in talk.lines[0]


def test_patience_names_the_field_that_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"Patience\.heartbeat_seconds"):
        Patience(heartbeat_seconds=0)
