"""Names and values of the learning rates (docs/metrics.md, ``lr/``)."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from sidestep.trainer_hooks.parameters import ParameterTable
from sidestep.trainer_hooks.reductions.learning_rate import group_names, learning_rates_message, reduce_learning_rates


class NanoVlm(nn.Module):
    """The three modules by which nanoVLM's groups are known."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9))
        self.MP = nn.Linear(4, 4, bias=False)


def names_of(model: nn.Module, groups: list[dict[str, Any]], wrapped: nn.Module | None = None) -> tuple[str, ...]:
    optimizer = torch.optim.SGD(groups, lr=0.1)
    outer = model if wrapped is None else wrapped
    return group_names(optimizer, outer, ParameterTable(outer, optimizer))


@pytest.mark.parametrize("compiled", [False, True])
def test_nanovlm_groups_are_known_by_whose_parameters_they_hold(compiled: bool) -> None:
    model = NanoVlm()
    wrapped = cast("nn.Module", torch.compile(model, backend="eager")) if compiled else None
    parts = {
        "modality_projector": {"params": list(model.MP.parameters())},
        "vision_encoder": {"params": list(model.vision_encoder.parameters())},
        "language_model": {"params": list(model.decoder.parameters())},
    }
    assert names_of(model, list(parts.values()), wrapped) == tuple(parts)
    assert names_of(model, list(parts.values())[::-1], wrapped) == tuple(parts)[::-1]
    assert names_of(model, [parts["language_model"]], wrapped) == ("language_model",)
    # One module's parameters in two groups, and a group over two modules.
    vision = list(model.vision_encoder.parameters())
    both = [
        {"params": vision[:2]},
        {"params": vision[2:]},
        {"params": [*model.MP.parameters(), *model.decoder.parameters()]},
    ]
    assert names_of(model, both, wrapped) == ("vision_encoder", "vision_encoder_1", "2")


def test_other_groups_go_by_name_then_module_then_index() -> None:
    model = nn.ModuleDict({"tower": nn.Linear(2, 2), "head": nn.Linear(2, 2), "neck": nn.Linear(2, 2)})
    stranger = nn.Parameter(torch.zeros(3))
    groups: list[dict[str, Any]] = [
        {"params": list(model["tower"].parameters()), "name": "slow"},
        {"params": list(model["head"].parameters())},
        {"params": [*model["neck"].parameters(), stranger]},
    ]
    assert names_of(model, groups) == ("slow", "head", "2")


def test_rates_are_floats_or_tensors_and_are_taken_as_they_are() -> None:
    moving = torch.tensor(0.25)
    parts = reduce_learning_rates([{"lr": 1e-3}, {"lr": moving}, {"lr": torch.tensor([2.0])}])
    moving.fill_(9.0)
    message = learning_rates_message(step=4, arrays={name: part.numpy() for name, part in parts.items()})
    assert message.step == 4
    assert message.rates.tolist() == [1e-3, 0.25, 2.0]


def test_a_group_that_finds_its_rate_by_itself_has_none() -> None:
    parts = reduce_learning_rates([{"lr": None}, {"lr": 0.5}, {}])
    assert parts["rates"].isnan().tolist() == [True, False, True]
