"""Gradient scalers, what the worker asks for, and a Trainer that reports to W&B by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import torch
import transformers
from tests.integration.transformers.recorded_trainer import (
    Recording,
    Ways,
    assert_losses_equal,
    callback_to,
    made,
    total_norm,
)

from sidestep.protocol.messages import Command, Gradients, LearningRates, Losses, Notice, StepEnd

SCALE = 2.0**21
"""So large that the first steps overflow, and are skipped."""


@pytest.fixture(autouse=True)
def quiet_library() -> Iterator[None]:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


class Asking(Ways):
    """A worker that asks for something from the start."""

    def __init__(self, *commands: Command) -> None:
        super().__init__()
        self._commands = commands

    def __call__(self, *arguments: Any) -> Any:
        opened = super().__call__(*arguments)
        opened.commands += self._commands
        return opened


class Scaled(Recording):
    """float16 with a scaler of the CPU's, which the Trainer itself gives to a GPU only; keeps what was skipped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
        self.accelerator.native_amp = True


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_float16_with_a_scaler_is_seen_unscaled_and_its_skipped_steps_are_not_applied(
    tmp_path: Path, optim: str
) -> None:
    """A fused optimizer is called in a skipped step as well, and skips it in its own kernel."""
    ways = Ways()
    half: dict[str, Any] = {"kind": Scaled, "fp16": True, "max_steps": 10, "optim": optim}
    alone, callback = made(tmp_path / "a", None, **half), callback_to(ways)
    alone.train()
    trainer = made(tmp_path / "b", callback, **half)
    trainer.train()
    callback.close()
    applied = np.isfinite(trainer.norms).tolist()
    assert callback.failures() == {}
    assert trainer.losses == alone.losses
    weights, others = trainer.model.state_dict(), alone.model.state_dict()
    assert [name for name in others if not torch.equal(weights[name], others[name])] == []

    assert {True, False} == set(applied), "some steps overflow, some do not"
    ends = ways.of(StepEnd)
    assert [end.step for end in ends] == list(range(1, 11))
    assert [end.applied for end in ends] == applied
    taken = [step for step, was_applied in enumerate(applied, start=1) if was_applied]
    gradients = ways.of(Gradients)
    assert [message.step for message in gradients] == taken
    assert [message.step for message in ways.of(LearningRates)] == taken
    norms = [total_norm(message) / message.scale for message in gradients]
    np.testing.assert_allclose(norms, [trainer.norms[step - 1] for step in taken], rtol=1e-3)
    assert_losses_equal(ways.of(Losses), trainer.batches)


def test_what_the_worker_asks_for_is_said_and_not_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asking = Asking(Command(action="stop", reason="collapse", at_step=2), Command(action="checkpoint", at_step=1))
    alone, callback = made(tmp_path / "a", None), callback_to(asking)
    alone.train()
    trainer = made(tmp_path / "b", callback)
    trainer.train()
    callback.close()
    assert trainer.state.global_step == 3
    assert trainer.losses == alone.losses
    assert not list((tmp_path / "b").glob("checkpoint-*"))
    said = capfd.readouterr().err
    assert 'asks for: stop (collapse). This callback does not do it; obeys=("stop",) would.' in said
    assert 'asks for: checkpoint. This callback does not do it; obeys=("checkpoint",) would.' in said
    assert callback.failures() == {}


def test_what_it_asks_for_is_done_where_the_user_said_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asking = Asking(Command(action="checkpoint", at_step=1), Command(action="stop", reason="collapse", at_step=2))
    callback = callback_to(asking, obeys=("stop", "checkpoint"))
    trainer = made(tmp_path, callback)
    trainer.train()
    callback.close()
    assert trainer.state.global_step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert "done as the worker asks: stop (collapse)." in capfd.readouterr().err
    assert callback.failures() == {}
    with pytest.raises(ValueError, match=r"obeys is \['sample'\]; TrainerCallback can: checkpoint, stop"):
        callback_to(asking, obeys=("sample",))
    with pytest.raises(TypeError, match="no argument endpont"):
        callback_to(asking, endpont="ipc://x")


def test_a_trainer_that_reports_to_wandb_itself_is_told_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb: Any = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    ways = Ways()
    callback = callback_to(ways)
    trainer = made(tmp_path, callback, report_to=["wandb"])
    try:
        trainer.train()
        assert wandb.run is not None
    finally:
        wandb.finish()
    callback.close()
    assert callback.failures() == {}
    said = capfd.readouterr().err
    assert said.count("the Trainer reports to W&B itself, and the worker opens a run too") == 1
    assert said.count("there will be two") == 1, said
    assert [notice.code for notice in ways.of(Notice)] == ["wandb"]
