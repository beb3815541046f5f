"""What a guarded call does within a compiled function: it runs whole and untraced, and raises nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sidestep.trainer_hooks import guard as guard_module
from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.guard import Guard, guarded


class Owner:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.guard = Guard(Console(self.said.append))
        self.seen: list[tuple[float, bool]] = []

    @guarded
    def outer(self, values: torch.Tensor) -> int:
        self.seen.append((float(values.sum().item()), torch.is_grad_enabled()))
        self.inner()
        return 3

    @guarded
    def inner(self) -> None:
        raise ValueError("broken")


@pytest.fixture(params=["as it is", "a torch that cannot tell who traces"])
def owner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Owner:
    if request.param != "as it is":
        always: Callable[[], object] = lambda: True  # noqa: E731
        monkeypatch.setattr(guard_module, "_frame_callback", always)
    return Owner()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # where Dynamo takes up again
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_guarded_call_is_the_same_within_a_compiled_function(owner: Owner, is_compiled: bool) -> None:
    def step(values: torch.Tensor) -> tuple[torch.Tensor, Any]:
        doubled = values * 2
        said = owner.outer(doubled)
        return (doubled * 3).sum(), said

    torch.compiler.reset()
    call: Any = torch.compile(step, backend="eager") if is_compiled else step
    for _ in range(3):
        total, said = call(torch.ones(3, requires_grad=True))
        assert total.item() == 18.0
        assert total.requires_grad
        assert said == 3
    torch.compiler.reset()
    assert owner.seen == [(6.0, False)] * 3
    assert owner.guard.failures == {"inner": 3}
    assert len(owner.said) == 1
    assert not owner.guard.is_shielded
    assert not owner.guard.is_inside
    assert torch.is_grad_enabled()


def test_what_belongs_to_the_trainer_passes(owner: Owner) -> None:
    class Interrupted(Owner):
        @guarded
        def stop(self) -> None:
            raise KeyboardInterrupt

    interrupted = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        interrupted.stop()
    assert not interrupted.guard.is_inside
    assert not interrupted.guard.failures
