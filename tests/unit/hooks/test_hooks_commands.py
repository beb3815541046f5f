"""What the worker asks for is taken at a boundary, told to whom it may concern, and answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sidestep
from sidestep.protocol.messages import Command, Kind
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.samples import Sample
from sidestep.trainer_hooks.transport import InProcessTransport


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.embedding(input_ids))
        made = {"logits": logits}
        if labels is not None:
            made["loss"] = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return made


class Letters:
    def __len__(self) -> int:
        return 11

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + token) for token in ids)


class Training:
    def __init__(self, **arguments: Any) -> None:
        self.model = Model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.transports: list[InProcessTransport] = []

        def opened(*parts: Any) -> InProcessTransport:
            self.transports.append(InProcessTransport(*parts))
            return self.transports[-1]

        config = arguments.pop("config", HooksConfig(vocabulary_size=11, eos_id=1))
        self.hooks = sidestep.attach(self.model, self.optimizer, config=config, transport=opened, **arguments)

    def step(self, number: int) -> Command | None:
        ids = torch.randint(0, 11, (2, 6))
        self.model(ids, labels=ids)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.hooks.after_step(number)

    def notices(self) -> list[str]:
        messages: list[Any] = self.transports[0].messages
        return [message.code for message in messages if message.kind == Kind.NOTICE]


def test_a_stop_is_returned_once_told_and_answered() -> None:
    told: list[Command] = []
    training = Training(on_incident=told.append)
    assert training.step(0) is None
    stop = Command(action="stop", command_id="7", reason="nonfinite")
    training.transports[0].commands.append(stop)
    assert training.step(1) is stop
    assert training.step(2) is None
    assert told == [stop]
    assert training.notices() == ["command-taken:7"]
    assert training.transports[0].hello.settings["on_incident"] == "call"


def test_a_callable_that_raises_is_counted_and_the_training_goes_on() -> None:
    def fails(_command: Command) -> None:
        raise RuntimeError("mine")

    training = Training(on_incident=fails)
    training.step(0)
    training.transports[0].commands.append(Command(action="stop", command_id="7"))
    assert training.step(1) is None
    assert training.step(2) is None
    assert training.hooks.failures() == {"on_incident": 1}


def test_the_way_of_incidents_travels_with_the_run() -> None:
    training = Training(on_incident="stop")
    training.step(0)
    assert training.transports[0].hello.settings["on_incident"] == "stop"
    with pytest.raises(ValueError, match="on_incident"):
        Training(on_incident="panic")


def test_samples_are_generated_on_demand_between_two_dues() -> None:
    config = HooksConfig(vocabulary_size=11, eos_id=1, collapse_detection_interval=0, max_new_tokens=3)
    training = Training(
        config=config,
        tokenizer=Letters(),
        samples=[Sample(question="q", prompt_ids=[2, 3], target="t")],
        generate_fn=lambda _model, samples, length: [[4] * length for _ in samples],
    )
    for number in range(1, 4):
        training.step(number)
    training.transports[0].commands.append(Command(action="sample", command_id="9"))
    assert training.step(4) is None
    training.step(5)
    messages: list[Any] = training.transports[0].messages
    assert [message.step for message in messages if message.kind == Kind.GENERATION] == [4]
    ends = {message.step: message for message in messages if message.kind == Kind.STEP_END}
    assert [ends[step].sent.get("generation", 0) for step in range(1, 6)] == [0, 0, 0, 1, 0]
    assert training.notices() == ["command-taken:9"]


def test_a_stage_is_marked_once() -> None:
    training = Training()
    training.step(0)
    training.hooks.mark_stage("long answers")
    training.step(1)
    training.step(2)
    messages: list[Any] = training.transports[0].messages
    ends = [message for message in messages if message.kind == Kind.STEP_END]
    assert [end.stage for end in ends] == ["", "long answers", ""]
