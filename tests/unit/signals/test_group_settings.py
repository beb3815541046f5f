"""What the optimizer's groups are set to, as every step tells it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sidestep
from sidestep.protocol.messages import Signals
from sidestep.protocol.signals import GROUP_SETTINGS
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.signals.group_settings import MAX_GROUPS, group_settings, host_number
from sidestep.trainer_hooks.transport import InProcessTransport

NAN = float("nan")


class Lion(torch.optim.Optimizer):
    """Signs, with two betas and no eps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1})


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3))]


def group(**settings: Any) -> Any:
    """An optimizer as far as its groups go."""
    return type("Grouped", (), {"param_groups": [{"params": [], **settings}]})()


OPTIMIZERS: dict[str, tuple[Any, list[float]]] = {
    "AdamW": (
        lambda: torch.optim.AdamW(weights(), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02), [0.8, 0.95, 1e-6, 0.02]
    ),
    "SGD": (lambda: torch.optim.SGD(weights(), lr=0.1, momentum=0.9, weight_decay=5e-4), [0.9, NAN, NAN, 5e-4]),
    "RMSprop": (lambda: torch.optim.RMSprop(weights(), eps=1e-7), [0.0, NAN, 1e-7, 0.0]),
    "Adagrad": (lambda: torch.optim.Adagrad(weights(), weight_decay=0.1), [NAN, NAN, 1e-10, 0.1]),
    "Adafactor": (lambda: torch.optim.Adafactor(weights(), weight_decay=0.0), [NAN, NAN, NAN, 0.0]),
    "Lion": (lambda: Lion(weights()), [0.9, 0.99, NAN, 0.1]),
    "three betas": (lambda: group(betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0), [0.98, NAN, 1e-8, 0.0]),
    "Prodigy": (lambda: group(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, d=1e-6), [0.9, 0.999, 1e-8, NAN]),
    "momentum given as nothing": (lambda: group(momentum=None, eps=None), [NAN, NAN, NAN, NAN]),
    "tensors on the host": (
        lambda: group(betas=(torch.tensor(0.9), torch.tensor(0.99)), eps=np.float32(1e-8), weight_decay=torch.zeros(1)),
        [0.9, 0.99, 1e-8, 0.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizers_settings(name: str) -> None:
    make, expected = OPTIMIZERS[name]
    np.testing.assert_allclose(group_settings(make()), expected, rtol=1e-6)
    assert len(expected) == len(GROUP_SETTINGS)


def test_groups_one_after_another_as_they_are_now() -> None:
    groups: list[dict[str, Any]] = [{"params": weights()}, {"params": weights(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    assert group_settings(optimizer) == (0.9, 0.999, 1e-8, 0.01, 0.9, 0.999, 1e-8, 0.0)
    optimizer.param_groups[1]["betas"] = (0.5, 0.9)
    optimizer.add_param_group({"params": weights()})
    assert group_settings(optimizer)[4:6] == (0.5, 0.9)
    assert len(group_settings(optimizer)) == 12
    many = torch.optim.SGD([{"params": weights()} for _ in range(20)], lr=0.1)
    assert len(group_settings(many)) == MAX_GROUPS * len(GROUP_SETTINGS)


def test_without_groups_there_is_nothing() -> None:
    assert group_settings(object()) == ()


@pytest.mark.parametrize("value", [None, "0.9", torch.zeros(2), torch.zeros((), device="meta"), (1e-30, 1e-3)])
def test_what_is_no_number_on_the_host_is_not_known(value: object) -> None:
    assert np.isnan(host_number(value))


class Model(nn.Module):
    """A table of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 9)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.table(input_ids)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)])
def test_every_step_tells_what_it_was_taken_with(rate: Any) -> None:
    model = Model()
    made: list[InProcessTransport] = []

    def opened(*arguments: Any) -> InProcessTransport:
        made.append(InProcessTransport(*arguments))
        return made[-1]

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)
    hooks = sidestep.attach(model, optimizer, config=HooksConfig(vocabulary_size=9), transport=opened)
    for step in range(3):
        ids = torch.arange(8).reshape(2, 4)
        loss, _ = model(ids, labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.after_step(step)
        optimizer.param_groups[0]["weight_decay"] = 0.5 + step
        assert made[0].messages
    hooks.close()
    said = [message for message in made[0].messages if isinstance(message, Signals)]
    assert [each.group_settings.dtype for each in said] == [np.dtype(np.float32)] * 3
    assert [float(each.group_settings[3]) for each in said] == pytest.approx([0.01, 0.5, 1.5])
    assert [each.rates.tolist() for each in said] == [pytest.approx([0.01])] * 3
    assert [each.gradients_lost for each in said] == [0, 0, 0]
    assert hooks.failures() == {}
