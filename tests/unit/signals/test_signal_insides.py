"""Images, projector, heartbeat, gradient norms and the budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sidestep.trainer_hooks.signals.budget import OverheadBudget
from sidestep.trainer_hooks.signals.heartbeat import Heartbeat
from sidestep.trainer_hooks.signals.images import copied_images, describe_images, find_images, image_numbers
from sidestep.trainer_hooks.signals.late_rows import late_image_numbers, late_projector_numbers
from sidestep.trainer_hooks.signals.module_norms import module_norms, whole_norm
from sidestep.trainer_hooks.signals.optimizer_steps import OptimizerSteps
from sidestep.trainer_hooks.signals.projector import ProjectorWatch, find_projector, projector_numbers


def described(value: object) -> tuple[list[int], list[float]]:
    numbers = image_numbers(value)
    assert numbers is not None
    hashes, deviations, means = describe_images([numbers.numpy()])
    assert means.tolist() == numbers[:, 0].tolist()
    return hashes.tolist(), deviations.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_images_are_told_apart_whatever_their_nesting(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images = (torch.rand(6, 3, 8, 8) * 255).to(dtype)
    images[4] = images[1]
    hashes, deviations = described(images)
    assert len(set(hashes)) == 5
    assert hashes[1] == hashes[4]
    expected = images.float().flatten(1).std(dim=1, correction=0)
    np.testing.assert_allclose(deviations, expected.numpy(), rtol=1e-4)
    assert described(images.reshape(2, 3, 3, 8, 8))[0] == hashes
    assert described([[images[0], images[1:3]], [], [images[3:]]])[0] == hashes


def test_an_image_of_one_colour_has_no_deviation_and_noise_has() -> None:
    white, noise = torch.full((3, 32, 32), 0.37), torch.full((3, 32, 32), 0.37)
    noise += torch.randn(3, 32, 32) * 0.01
    hashes, deviations = described([white, noise])
    assert deviations[0] == 0.0
    assert deviations[1] > 0.005
    assert hashes[0] != hashes[1]


def test_pages_that_differ_in_a_line_of_text_differ() -> None:
    pages = torch.ones(20, 3, 512, 384)
    draw = np.random.default_rng(0)
    for page in pages:
        top = int(draw.integers(20, 480))
        page[:, top : top + 8, 30:350] = torch.from_numpy(draw.integers(0, 2, (8, 320)).astype(np.float32))
    assert len(set(described(pages)[0])) == 20


def test_images_are_found_by_the_arguments_name() -> None:
    image = torch.zeros(1, 3, 4, 4)
    assert find_images({"input_ids": torch.zeros(1, 2), "pixel_values": image}) == ("pixel_values", image)
    assert find_images({"images": [[], []]}) is None
    assert find_images({"pixel_values": None}) is None
    assert find_images({"pixels": image}) is None


def test_images_of_one_size_are_copied_together_in_their_order() -> None:
    drawn = torch.rand(300, 3, 4, 4)
    wanted = drawn.flatten(1)
    nested = [[], [drawn[:1], drawn[1:2]], (drawn[2:3],), [drawn[:0]]]
    for given, count in ((drawn, 256), (nested, 3), (list(drawn), 256), ([drawn[0]], 1), ([drawn, drawn], 256)):
        copied = copied_images(given, 1 << 20)
        assert copied is not None
        assert torch.equal(copied, wanted[:count])
    framed = [each.contiguous(memory_format=torch.channels_last) for each in torch.split(drawn[:6], 2)]
    copied = copied_images(framed, 1 << 20)
    assert copied is not None
    assert torch.equal(copied, wanted[:6])
    drawn.zero_()
    assert copied.any()


@pytest.mark.parametrize(
    "given",
    [
        [],
        [torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)],
        [torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4)],
        [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.float16)],
        [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, device="meta")],
        torch.zeros(6, 3, 8, 8),
    ],
    ids=["none", "sizes", "numbers", "dtypes", "devices", "too many"],
)
def test_images_that_differ_or_are_many_are_not_copied(given: Any) -> None:
    assert copied_images(given, 4_000) is None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(4, 4)
        self.multi_modal_projector = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.multi_modal_projector(self.vision(x)))  # type: ignore[no-any-return]


def test_the_projector_is_watched_in_training_alone() -> None:
    torch.manual_seed(0)
    model = Model()
    found = find_projector(model)
    assert found is not None
    assert found[0] == "multi_modal_projector"
    watch = ProjectorWatch(found[1], lambda: model.training)
    x = torch.randn(5, 7, 4)
    model(x)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    seen = watch.take()
    assert len(seen) == 1
    output = model.multi_modal_projector(model.vision(x)).double().detach()
    rms, spread = late_projector_numbers(seen[0].numpy()).tolist()
    assert rms == pytest.approx(float(output.square().mean().sqrt()), rel=1e-5)
    assert spread == pytest.approx(float(output.mean(dim=1).var(dim=0, correction=0).mean().sqrt()), rel=1e-5)
    watch.remove()
    watch.take()
    model(x)
    assert watch.take() == []
    assert watch.errors == []


def test_a_compiled_model_is_not_hooked_inside() -> None:
    model = Model()
    assert find_projector(torch.compile(model, backend="eager")) is None  # type: ignore[arg-type]
    assert find_projector(nn.Linear(2, 2)) is None


def test_the_projectors_spread_is_zero_for_equal_images_and_unknown_for_one() -> None:
    same = torch.randn(1, 4, 3).expand(5, 4, 3)
    rms, spread = projector_numbers(same).tolist()
    assert spread < 1e-7 < rms
    assert projector_numbers(same[:1]).tolist()[1] == -1.0


@pytest.mark.parametrize("shape", [(5, 7, 6), (1, 7, 6), (4, 6), (3, 2, 2, 6)])
def test_a_small_output_of_the_projector_is_read_alike_later(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    value = torch.randn(shape)
    np.testing.assert_allclose(late_projector_numbers(value.numpy()), projector_numbers(value).numpy(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_small_images_are_read_alike_later(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images = (torch.rand(7, 3, 9, 9) * 255).to(dtype)
    numbers = image_numbers(images)
    assert numbers is not None
    late = late_image_numbers(images.flatten(1).numpy())
    np.testing.assert_allclose(late[:, :2], numbers.numpy()[:, :2], rtol=1e-5)
    np.testing.assert_allclose(late[:, 2:], numbers.numpy()[:, 2:], atol=1e-3 * float(numbers[:, 1].sqrt().max()))


def test_the_heartbeat_changes_with_every_update_and_says_which_weights_it_is() -> None:
    torch.manual_seed(0)
    model = Model()
    heartbeat = Heartbeat(model)
    first = heartbeat.take()
    assert first is not None
    digest = heartbeat.digest
    same = heartbeat.take()
    assert same is not None
    assert torch.equal(first, same)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    moved = heartbeat.take()
    assert moved is not None
    assert (moved != first).all()
    assert heartbeat.digest == digest
    model.head.requires_grad_(False)
    for _ in range(10):  # looked at every tenth time
        heartbeat.take()
    assert heartbeat.digest != digest
    model.requires_grad_(False)
    assert [heartbeat.take() for _ in range(10)][-1] is None


def test_ranks_that_list_their_parameters_in_other_orders_send_the_same_weights() -> None:
    layers = {name: nn.Linear(9, 9) for name in (f"layer{place}" for place in range(24))}
    one, other = nn.ModuleDict(layers), nn.ModuleDict(dict(reversed(layers.items())))
    beats = [Heartbeat(model) for model in (one, other)]
    first, second = (beat.take() for beat in beats)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert beats[0].digest == beats[1].digest


def test_a_replaced_parameter_is_seen() -> None:
    model = Model()
    heartbeat = Heartbeat(model)
    heartbeat.take()
    model.vision.weight.data = torch.full((4, 4), 5.0)
    beat = [heartbeat.take() for _ in range(10)][-1]
    assert beat is not None
    assert (beat == 5.0).any()


def test_norms_of_the_modules_equal_float64() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(5, 3) * 1e-3, torch.randn(7), torch.zeros(0), torch.randn(2, 2).bfloat16()]
    held = list(zip([0, 2, 2, 2], gradients, strict=True))
    norms = module_norms(held, 4, 8.0)
    assert norms is not None
    expected = [
        float(gradients[0].double().norm()) / 8,
        -1.0,
        float((gradients[1].double().square().sum() + gradients[3].double().square().sum()).sqrt()) / 8,
        -1.0,
    ]
    np.testing.assert_allclose(norms.numpy(), expected, rtol=1e-5)
    assert float(whole_norm(norms)) == pytest.approx(float(np.hypot(expected[0], expected[2])), rel=1e-5)
    assert module_norms([], 4, None) is None


@pytest.mark.parametrize("value", [1e15, 1e-15])
def test_norms_neither_over_nor_underflow(value: float) -> None:
    norms = module_norms([(0, torch.full((100,), value)), (0, torch.full((5,), value))], 1, None)
    assert norms is not None
    assert float(norms[0]) == pytest.approx(value * 105**0.5, rel=1e-4)


def test_a_gradient_that_is_no_number_makes_the_norm_none() -> None:
    norms = module_norms([(0, torch.tensor([1.0, torch.nan])), (1, torch.ones(2))], 2, None)
    assert norms is not None
    assert torch.isnan(norms[0])
    assert not torch.isfinite(whole_norm(norms)).any()


def test_rows_are_halved_over_the_budget_and_come_back_under_it() -> None:
    budget = OverheadBudget(0.02)
    for _ in range(200):
        budget.measured(0.010 * budget.share, 0.1)
    assert budget.cost_share <= 0.02
    assert budget.share == 1 / 8
    assert budget.rows(896, 1) == 112
    for _ in range(200):
        budget.measured(0.0001 * budget.share, 0.1)
    assert budget.share == 1.0


def test_rows_have_a_floor_and_no_limit_is_no_limit() -> None:
    budget = OverheadBudget(0.001)
    for _ in range(500):
        budget.measured(0.05, 0.1)
    assert budget.rows(896, 1) == 64
    assert budget.rows(896, 14) == 4
    free = OverheadBudget(0.0)
    for _ in range(100):
        free.measured(0.05, 0.1)
    assert free.share == 1.0


def test_one_pause_of_the_machine_does_not_thin() -> None:
    budget = OverheadBudget(0.02)
    for step in range(300):
        budget.measured(1.0 if step == 100 else 0.001, 0.1)
    assert budget.share == 1.0


def stepped(optimizer: torch.optim.Optimizer, times: int) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    for _ in range(times):
        optimizer.step()


def test_the_optimizers_own_count_of_updates_is_read_where_it_keeps_one() -> None:
    first, second, third = (nn.Parameter(torch.ones(3)) for _ in range(3))
    adam = torch.optim.AdamW([{"params": [first]}, {"params": [second]}])
    counted_by = OptimizerSteps(adam)
    assert counted_by.take() is None
    stepped(adam, 3)
    adam.add_param_group({"params": [third]})
    assert counted_by.take() == [3.0, 3.0, -1.0]
    assert third not in adam.state  # asking made none
    adam.state.clear()
    stepped(adam, 1)
    assert counted_by.take() == [1.0, 1.0, 1.0]
    adam.state[first]["step"] = 7  # as an optimizer of 8 bits keeps it
    adam.state[second]["step"] = adam.state[third]["step"] = 8
    assert counted_by.take() == [7.0, 8.0, 8.0]
    momentum = torch.optim.SGD([first], lr=0.1, momentum=0.9)
    stepped(momentum, 2)
    assert OptimizerSteps(momentum).take() is None
    assert OptimizerSteps(object()).take() is None


def test_a_parameter_that_is_unfrozen_later_does_not_take_another_ones_place() -> None:
    late, early = (nn.Parameter(torch.ones(3)) for _ in range(2))
    adam = torch.optim.AdamW([{"params": [late, early]}])
    counted_by = OptimizerSteps(adam)
    early.grad = torch.ones(3)
    for _ in range(5):
        adam.step()
    assert counted_by.take() is not None
    stepped(adam, 1)
    assert adam.state[late]["step"] == 1
    assert counted_by.take() == [6.0]
