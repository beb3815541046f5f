"""Gradients that are thrown away between two micro-batches, and loops in which none are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.detector_traces import context
from torch import Tensor, nn

import sidestep
from sidestep.protocol.messages import Kind, Signals
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.signals.lost_gradients import LostGradients
from sidestep.trainer_hooks.transport import InProcessTransport
from sidestep.worker.records import AssembledStep, Part
from sidestep.worker.watch import Watch

VOCABULARY, ACCUMULATION, STEPS = 11, 4, 8


class Model(nn.Module):
    """A table, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.table(input_ids)
        for block in self.blocks:
            states = states + block(states)
        logits = self.head(states)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def loss_of(model: Model, ids: Tensor) -> Any:
    return model(ids, labels=ids)[0]


class Loop:
    """A trainer's loop, in several ways of its own."""

    def __init__(self, *, calls_on_batch: bool) -> None:
        torch.manual_seed(3)
        self.model = Model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.transports: list[InProcessTransport] = []
        self.calls_on_batch = calls_on_batch

        def opened(*arguments: Any) -> InProcessTransport:
            self.transports.append(InProcessTransport(*arguments))
            return self.transports[-1]

        config = HooksConfig(vocabulary_size=VOCABULARY, shifted=False)
        self.hooks = sidestep.attach(self.model, self.optimizer, config=config, transport=opened)

    def forward(self) -> Any:
        ids = torch.randint(0, VOCABULARY, (3, 5))
        loss, logits = self.model(ids, labels=ids)
        if self.calls_on_batch:
            self.hooks.on_batch(input_ids=ids, labels=ids, logits=logits.detach(), loss=loss.detach())
        return loss

    def run(self, step: Callable[[Loop], None], steps: int = STEPS) -> list[int]:
        """Train; returns what each step said."""
        for _ in range(steps):
            step(self)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.hooks.after_step()
            assert self.transports[0].messages
        assert self.hooks.failures() == {}
        return [each.gradients_lost for each in self.transports[0].messages if isinstance(each, Signals)]


def sound(loop: Loop) -> None:
    for _ in range(ACCUMULATION):
        (loop.forward() / ACCUMULATION).backward()


def zeroed_before_each(loop: Loop) -> None:
    for _ in range(ACCUMULATION):
        loop.optimizer.zero_grad()
        (loop.forward() / ACCUMULATION).backward()


def zeroed_after_the_first(loop: Loop) -> None:
    for place in range(ACCUMULATION):
        (loop.forward() / ACCUMULATION).backward()
        if place == 0:
            loop.optimizer.zero_grad()


def zeroed_behind_the_first_forward(loop: Loop) -> None:
    for place in range(ACCUMULATION):
        loss = loop.forward()
        if place == 0:
            loop.optimizer.zero_grad()
        (loss / ACCUMULATION).backward()


def two_forwards_share_a_backward(loop: Loop) -> None:
    (loop.forward() - 0.5 * loop.forward()).backward()


def sharpness_aware(loop: Loop) -> None:
    """Foret et al. 2020, arXiv:2010.01412: to the worst place near by, its gradient, and back."""
    loop.forward().backward()
    with torch.no_grad():
        steps = [0.05 * each.grad / each.grad.norm() for each in loop.model.parameters() if each.grad is not None]
        for parameter, step in zip(loop.model.parameters(), steps, strict=True):
            parameter.add_(step)
    loop.optimizer.zero_grad()
    loop.forward().backward()
    with torch.no_grad():
        for parameter, step in zip(loop.model.parameters(), steps, strict=True):
            parameter.sub_(step)


def summed_elsewhere(loop: Loop) -> None:
    """As Megatron does it: gradients go into buffers of its own, and come back for the update."""
    for _ in range(ACCUMULATION):
        loop.forward().backward()
        for parameter in loop.model.parameters():
            held = vars(parameter)
            held["main_grad"] = held.get("main_grad", 0.0) + parameter.grad
            parameter.grad = None
    for parameter in loop.model.parameters():
        parameter.grad = vars(parameter)["main_grad"].clone()
        vars(parameter)["main_grad"].zero_()


def taken_for_good(loop: Loop) -> None:
    """As in ZeRO, whose updates are made from flat buffers: no parameter ever has its gradient."""
    for _ in range(ACCUMULATION):
        loop.forward().backward()
        loop.optimizer.zero_grad()


@pytest.mark.parametrize("calls_on_batch", [False, True])
@pytest.mark.parametrize(("step", "each"), [(zeroed_before_each, ACCUMULATION - 1), (zeroed_after_the_first, 1)])
def test_zero_grad_within_the_accumulation_is_seen_from_the_second_step_on(
    step: Callable[[Loop], None], each: int, calls_on_batch: bool
) -> None:
    said = Loop(calls_on_batch=calls_on_batch).run(step)
    assert said == [0, *([each] * (STEPS - 1))]


@pytest.mark.parametrize("calls_on_batch", [False, True])
@pytest.mark.parametrize(
    "step",
    [
        sound, zeroed_behind_the_first_forward, two_forwards_share_a_backward, sharpness_aware, summed_elsewhere,
        taken_for_good,
    ],
)  # fmt: skip
def test_nothing_is_said_of_a_loop_that_loses_nothing(step: Callable[[Loop], None], calls_on_batch: bool) -> None:
    loop = Loop(calls_on_batch=calls_on_batch)
    assert loop.run(step) == [0] * STEPS
    assert not any(each._post_accumulate_grad_hooks for each in loop.model.parameters())


@pytest.mark.parametrize(("step", "expected"), [(zeroed_before_each, [3]), (sound, [])])
def test_the_worker_says_so_at_the_fourth_step(step: Callable[[Loop], None], expected: list[int]) -> None:
    loop = Loop(calls_on_batch=True)
    loop.run(step)
    watch, told = Watch(), []
    for each in (message for message in loop.transports[0].messages if isinstance(message, Signals)):
        parts = {Kind.SIGNALS: (Part(rank=0, message=each),)}
        seen = AssembledStep(
            run_id="run", attempt=0, step=each.step, reason="complete", parts=parts, ends={}, ranks_expected=1,
            ranks_seen=1,
        )  # fmt: skip
        if watch.observe(seen, context(tokenizer={})).values.get("incidents/gradients_lost") == 1:
            told.append(each.step)
    assert told == expected


def test_a_loop_that_is_mended_is_left_alone_again() -> None:
    loop = Loop(calls_on_batch=True)
    assert [loop.run(step, steps=3)[-3:] for step in (zeroed_before_each, sound, zeroed_before_each)] == [
        [0, 3, 3], [0, 0, 0], [0, 3, 3]
    ]  # fmt: skip


def test_a_step_that_was_not_taken_tells_nothing() -> None:
    loop = Loop(calls_on_batch=True)
    for number in range(4):
        zeroed_before_each(loop)
        loop.optimizer.zero_grad()
        loop.hooks.after_step(number, applied=False)
    assert {each.gradients_lost for each in loop.transports[0].messages if isinstance(each, Signals)} == {0}


def test_the_hooks_leave_no_trace_and_change_no_bit() -> None:
    loop = Loop(calls_on_batch=True)
    loop.run(zeroed_before_each)
    loop.hooks.close()
    assert not any(each._post_accumulate_grad_hooks for each in loop.model.parameters())
    torch.manual_seed(3)
    plain = Model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for _ in range(STEPS):
        for _ in range(ACCUMULATION):
            optimizer.zero_grad()
            ids = torch.randint(0, VOCABULARY, (3, 5))
            (loss_of(plain, ids) / ACCUMULATION).backward()
        optimizer.step()
    for mine, theirs in zip(loop.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_shares_are_never_looked_at() -> None:
    model = Model()
    lost = LostGradients(model, is_sharded=True)
    for _ in range(3):
        for place in range(2):
            lost.micro_batch(place)
            ids = torch.zeros((1, 4), dtype=torch.int64)
            loss_of(model, ids).backward()
            if place == 0:
                model.zero_grad()
        lost.before_update()
        assert lost.take() == 0


def test_where_none_of_the_chosen_gets_a_gradient_others_are_chosen() -> None:
    model = Model()
    lost = LostGradients(model, is_sharded=False)
    said = []
    for number in range(220):
        model.requires_grad_()
        if number < 110:  # one layer alone is trained at first
            model.requires_grad_(False)
            model.blocks[3].bias.requires_grad_()
        else:
            model.blocks[3].requires_grad_(False)
        for place in range(2):
            model.zero_grad()
            lost.micro_batch(place)
            ids = torch.zeros((1, 4), dtype=torch.int64)
            loss_of(model, ids).backward()
        lost.before_update()
        said.append(lost.take())
        model.zero_grad()
    lost.remove()
    assert said[1:110] == [1] * 109
    assert said[-5:] == [1] * 5
