"""What a worker asks of trainers: once, ahead of all ranks, and again where it was too near."""

from __future__ import annotations

from sidestep.protocol.messages import Command, Notice
from sidestep.worker.requests import MAX_PROPOSALS, Requests


class Sent:
    def __init__(self) -> None:
        self.commands: list[tuple[str, Command]] = []
        self.requests = Requests(lambda run_id, command: self.commands.append((run_id, command)))

    def ask(self, action: str = "stop", world_size: int = 4, newest_step: int = 100) -> None:
        command = Command(action=action, command_id="c1", reason="why")
        self.requests.ask("run", command, world_size=world_size, newest_step=newest_step)

    def answer(self, code: str, step: int) -> None:
        self.requests.heard("run", Notice(text="t", code=f"{code}:c1", step=step))

    @property
    def steps(self) -> list[int]:
        return [command.at_step for _, command in self.commands]


def test_one_process_is_asked_for_its_next_boundary_once() -> None:
    sent = Sent()
    sent.ask(world_size=1)
    sent.ask(world_size=1)
    assert sent.steps == [-1]
    sent.answer("command-taken", 101)
    assert sent.requests.counts == {"asked": 1, "taken": 1, "proposed_again": 0, "given_up": 0}


def test_samples_need_no_agreement() -> None:
    sent = Sent()
    sent.ask(action="sample")
    assert sent.steps == [-1]


def test_what_was_too_near_is_proposed_further_ahead_once_for_all_ranks() -> None:
    sent = Sent()
    sent.ask()
    assert sent.steps == [120]
    for _rank in range(4):
        sent.answer("command-late", 120)
    assert sent.steps == [120, 160]
    sent.answer("command-taken", 160)
    assert sent.requests.counts["taken"] == 1
    sent.answer("command-late", 160)
    assert sent.steps == [120, 160]


def test_in_the_end_it_is_given_up() -> None:
    sent = Sent()
    sent.ask()
    for _ in range(20):
        sent.answer("command-late", sent.steps[-1])
    assert len(sent.steps) == MAX_PROPOSALS
    assert sent.requests.counts["given_up"] == 1


def test_other_notices_are_left_alone() -> None:
    sent = Sent()
    sent.ask()
    sent.requests.heard("run", Notice(text="t", code="wandb"))
    sent.requests.heard("other", Notice(text="t", code="command-taken:c1"))
    assert sent.requests.counts["taken"] == 0
