"""The probe of the wiring leaves the training alone, and a model that cannot be asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.wiring_models import (
    IGNORE,
    VOCABULARY,
    WIDTH,
    Checkpointed,
    Fused,
    Shifted,
    Trained,
    Transformer,
)
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn import functional as F

from sidestep.trainer_hooks.wiring_probe import MAX_FAILURES


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Cast(Transformer):
    """Remembers the dtype of its logits."""

    def logits(self, *given: Any) -> torch.Tensor:
        made = super().logits(*given)
        self.dtypes = [*getattr(self, "dtypes", []), (torch.is_grad_enabled(), made.dtype)]
        return made


def test_it_runs_under_the_autocast_of_the_training_and_leaves_its_cache_alone() -> None:
    model = Cast()
    before = model.head.weight.detach().clone()

    class Autocast(Trained):
        def trained_on(self, given: dict[str, torch.Tensor]) -> float:
            with torch.autocast("cpu", torch.bfloat16):
                return super().trained_on(given)

    trained = Autocast(model)
    assert trained.failures == {}
    assert trained.probes[0].future_change == 0.0
    assert set(model.dtypes) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert not torch.equal(before, model.head.weight)


@pytest.mark.parametrize("model", [Transformer, Shifted, Checkpointed, Fused])
def test_no_bit_of_the_training_changes(model: type[Transformer]) -> None:
    runs = []
    for interval in (0, 1):
        torch.manual_seed(3)
        runs.append(Trained(model("everything"), "padded", steps=12, accumulation=2, wiring_probe_interval=interval))
    plain, probed = runs
    assert len(probed.probes) == 11
    assert plain.failures == probed.failures == {}
    assert plain.losses == probed.losses
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, probed.model.state_dict()[name]), name
    assert all(each.training for each in probed.model.modules())
    assert probed.model.calls > plain.model.calls >= 24  # type: ignore[operator]


def test_a_forward_of_the_probe_is_not_taken_for_one_of_the_training() -> None:
    trained = Trained(Transformer(), "text", steps=12, wiring_probe_interval=1, answer_length_interval=1)
    assert len(trained.probes) == 11
    assert all(end.sent["signals"] == 1 for end in trained.ends)
    assert trained.ends[-1].step == 11


class Encoder(nn.Module):
    """No token ids: features and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(features)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE), logits


class WithFeatures(Trained):
    def trained_on(self, given: dict[str, torch.Tensor]) -> float:
        return super().trained_on({"features": torch.rand(4, 20, WIDTH), "labels": given["labels"]})


class Silent(Transformer):
    """Never shows logits."""

    def forward(self, *given: Any, **named: Any) -> tuple[torch.Tensor]:  # type: ignore[override]
        return (super().forward(*given, **named)[0],)


class Translating(Transformer):
    """Says that it has an encoder."""

    class config:  # noqa: N801  (an attribute of that name)
        is_encoder_decoder = True


@pytest.mark.parametrize("of", [Encoder, Translating])
def test_a_model_that_cannot_be_asked_says_nothing(of: type[nn.Module]) -> None:
    trained = (WithFeatures if of is Encoder else Trained)(of())
    assert trained.failures == {}
    assert trained.probes == []


class Failing(Transformer):
    """Raises where gradients are off."""

    def forward(self, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.is_grad_enabled():
            self.forwards += 1
            raise RuntimeError("not now")
        return super().forward(*given, **named)


class Synchronised(Transformer):
    """Counts over all ranks in its forward."""

    def logits(self, *given: Any) -> torch.Tensor:
        dist.all_reduce(torch.ones(()))
        return super().logits(*given)


def test_what_fails_is_said_once_and_switched_off(capfd: pytest.CaptureFixture[str]) -> None:
    trained = Trained(Failing(), steps=12, wiring_probe_interval=1)
    assert trained.failures == {"wiring_probe": MAX_FAILURES}
    assert trained.probes == []
    assert capfd.readouterr().err.count("a measurement failed in wiring_probe") == 1
    assert isinstance(trained.model, Failing)
    assert int(trained.model.forwards) == 12  # what a failed one counted was put back


@pytest.fixture
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_a_collective_is_refused_before_it_waits_for_the_other_ranks() -> None:
    trained = Trained(Synchronised(), steps=12, wiring_probe_interval=1)
    assert trained.failures == {"wiring_probe": MAX_FAILURES}
    assert trained.probes == []
