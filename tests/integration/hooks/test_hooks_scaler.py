"""A fused optimizer under a GradScaler: it is called in a step that overflows too, and leaves it out by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sidestep.protocol.messages import Gradients, Kind, LearningRates, StepEnd
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.gradient_scale import is_known_overflow, overflow_flag, with_flag
from sidestep.trainer_hooks.hooks import attach
from sidestep.trainer_hooks.open_step import OpenStep, StepFacts, StepGradients, stage_step
from sidestep.trainer_hooks.reductions.gradients import LocalGradient, reduce_gradients
from sidestep.trainer_hooks.staging import Staging
from sidestep.trainer_hooks.transport import InProcessTransport

EVERY = HooksConfig(gradient_log_interval=1, lr_interval=1)


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_is_a_step_that_was_not_applied(trainer: Callable[..., Any], fused: bool) -> None:
    trained = trainer()
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    opened: list[InProcessTransport] = []

    def way(*given: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*given))
        return opened[-1]

    with attach(trained.model, optimizer, config=EVERY, scaler=scaler, transport=way) as hooks:
        for step, factor in enumerate((1.0, float("inf"), 1.0)):
            batch = trained.batch()
            loss = trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])[1]
            before = trained.weights()
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            hooks.after_step(step)
            changed = any(not torch.equal(value, before[name]) for name, value in trained.weights().items())
            assert changed == (factor == 1.0)
        assert hooks.failures() == {}
    messages = opened[0].messages
    assert [end.applied for end in messages if isinstance(end, StepEnd)] == [True, False, True]
    assert [message.step for message in messages if isinstance(message, Gradients)] == [0, 2]
    assert [message.step for message in messages if isinstance(message, LearningRates)] == [0, 2]


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_a_flag_that_comes_from_a_device_decides_when_it_has_arrived(flag: float) -> None:
    tensors = reduce_gradients([LocalGradient(parameter=0, module=0, gradient=torch.ones(3))])
    opened = OpenStep(
        expected=0, due=frozenset({"gradients", "lr"}), gradients=StepGradients(tensors, (), clipped=False),
        rates={"rates": torch.tensor([0.1], dtype=torch.float64)}, overflow=torch.tensor([flag]),
    )  # fmt: skip
    facts = StepFacts(step=0, applied=True, due=opened.due, world_size=1, staging_bytes=1 << 20)
    staging = Staging()
    counts = stage_step(opened, facts, staging)
    assert counts.sent == {"gradients": 1, "learning_rates": 1}
    made = {message.kind for message in staging.poll()}
    given_up = {(skip.kind, skip.announced) for skip in staging.take_skips()}
    if flag:
        assert (made, given_up) == (set(), {(Kind.GRADIENTS, True), (Kind.LEARNING_RATES, True)})
    else:
        assert (made, given_up) == ({Kind.GRADIENTS, Kind.LEARNING_RATES}, set())


def test_a_flag_on_a_device_is_not_read() -> None:
    class Fused:
        found_inf: torch.Tensor

    with FakeTensorMode():
        optimizer = Fused()
        optimizer.found_inf = torch.ones((), device="cuda")
        flag = overflow_flag(optimizer)
        assert flag is not None
        assert flag.device.type == "cuda"
        assert flag.shape == (1,)
        assert not is_known_overflow(flag)
        assert with_flag({}, flag)["overflow"] is flag
    assert overflow_flag(torch.optim.SGD([torch.zeros(1)])) is None
