"""An optimizer that is stepped with a closure: forward and backward run within the step, after its pre-hook."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sidestep
from sidestep.protocol.messages import Gradients, LearningRates, StepEnd, Tokens
from sidestep.trainer_hooks.transport import InProcessTransport

V, STEPS = 11, 6


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 4)
        self.head = nn.Linear(4, V)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.head(self.embedding(input_ids))
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
        return logits, loss


@pytest.mark.parametrize("by_name", [True, False])
def test_gradients_and_rates_of_a_step_with_a_closure_are_its_own(by_name: bool) -> None:
    opened: list[InProcessTransport] = []

    def open_transport(*arguments: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*arguments))
        return opened[-1]

    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    config = sidestep.HooksConfig(
        token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1, gradient_log_interval=2
    )
    hooks = sidestep.attach(model, optimizer, config=config, transport=open_transport)
    norms, returned = [], []
    for step in range(STEPS):
        ids = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(step))

        def closure(ids: torch.Tensor = ids) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(ids, ids)[1]
            loss.backward()  # type: ignore[no-untyped-call]
            norms.append([float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None])
            return loss

        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        returned.append(optimizer.step(closure=closure) if by_name else optimizer.step(closure))
    hooks.close()
    assert hooks.failures() == {}
    assert [loss is not None for loss in returned] == [True] * STEPS
    assert len(norms) == STEPS
    messages = opened[0].messages
    assert [m.step for m in messages if isinstance(m, StepEnd)] == list(range(STEPS))
    assert [m.step for m in messages if isinstance(m, Tokens)] == list(range(STEPS))
    rates = [(m.step, m.rates.tolist()) for m in messages if isinstance(m, LearningRates)]
    assert rates == [(step, [0.1 / (step + 1)]) for step in range(STEPS)]
    gradients = {m.step: m for m in messages if isinstance(m, Gradients)}
    assert sorted(gradients) == [0, 2, 4]
    for step, message in gradients.items():
        squares = 4.0 ** message.exponents.astype(np.float64) * (message.m2 + message.counts * message.means**2)
        np.testing.assert_allclose(np.sqrt(squares), norms[step], rtol=1e-5)
        assert message.clipped
