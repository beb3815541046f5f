"""The ways in which people run ``Trainer``: smoothing, mixed precision, recomputation, no clipping, failures, NaN."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

import torch
import transformers
from tests.integration.transformers import smolvlm_trainer as tiny
from tests.integration.transformers.recorded_trainer import (
    Recording,
    Ways,
    assert_losses_equal,
    callback_to,
    made,
    total_norm,
)

import sidestep
from sidestep.protocol.messages import Answers, Gradients, Losses, Notice, Scalars, StepEnd, Tokens
from sidestep.trainer_hooks.integrations.transformers import STATE_KEY


@pytest.fixture(autouse=True)
def quiet_library() -> Iterator[None]:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


@pytest.fixture
def ways() -> Ways:
    return Ways()


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "bfloat16": {"bf16": True},
    "recomputed activations": {"gradient_checkpointing": True},
    "recomputed, reentrant": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "no clipping": {"max_grad_norm": 0.0},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "evaluated at every step": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad",
    "ignore:The .grad attribute of a Tensor",
    "ignore:.*is deprecated and will be removed:FutureWarning",
)
def test_a_training_in_another_way_is_seen_whole_and_left_as_it_is(tmp_path: Path, ways: Ways, variant: str) -> None:
    torch.compiler.reset()
    alone = made(tmp_path / "a", None, **VARIANTS[variant])
    alone.train()
    torch.compiler.reset()
    callback = callback_to(ways)
    trainer = made(tmp_path / "b", callback, **VARIANTS[variant])
    trainer.train()
    callback.close()
    assert callback.failures() == {}
    assert trainer.losses == alone.losses
    weights, others = trainer.model.state_dict(), alone.model.state_dict()
    assert [name for name in others if not torch.equal(weights[name], others[name])] == []

    assert [end.step for end in ways.of(StepEnd)] == [1, 2, 3]
    assert_losses_equal(ways.of(Losses), trainer.batches)
    for sent, batch in zip(ways.of(Tokens), trainer.batches, strict=True):
        assert sent.positions == batch.input_ids.size
    assert [end.sent["gradients"] for end in ways.of(StepEnd)] == [1, 1, 1]
    gradients = ways.of(Gradients)
    assert [message.clipped for message in gradients] == [False] * 3
    np.testing.assert_allclose([total_norm(message) for message in gradients], trainer.norms, rtol=1e-3)
    reported = [message.values["train/loss"] for message in ways.of(Scalars) if "train/loss" in message.values]
    by_step = [float(np.mean([m.trainer_loss[0] for m in ways.of(Losses) if m.step == step])) for step in (1, 2, 3)]
    np.testing.assert_allclose(by_step, reported, rtol=1e-5)


def test_gradients_are_taken_at_the_first_clipping_of_a_step(tmp_path: Path, ways: Ways) -> None:
    class Twice(Recording):
        def _clip_grad_norm(self, model: Any) -> Any:
            norm = super()._clip_grad_norm(model)
            self.accelerator.clip_grad_norm_(model.parameters(), float("inf"))  # asks for the norm once more
            return norm

    callback = callback_to(ways)
    trainer = made(tmp_path, callback, kind=Twice)
    trainer.train()
    callback.close()
    assert min(trainer.norms) > 1.0, "clipped to 0.5 by then"
    np.testing.assert_allclose([total_norm(message) for message in ways.of(Gradients)], trainer.norms, rtol=1e-3)


def test_no_logits_outlive_their_step(tmp_path: Path, ways: Ways) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    class Remembering(transformers.Trainer):  # type: ignore[misc]  # its types are not read
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            alive.append(weakref.ref(outputs.logits))
            return (loss, outputs) if return_outputs else loss

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            assert [ref for ref in alive if ref() is not None] == []
            return loss

    callback = callback_to(ways)
    made(tmp_path, callback, kind=Remembering).train()
    callback.close()
    assert len(alive) == len(ways.of(Losses)) == 6


def test_nan_is_seen_before_the_trainers_filter_hides_it(tmp_path: Path, ways: Ways) -> None:
    rows = tiny.rows(8)
    for row in rows:
        row["pixel_values"][:] = math.nan
    callback = callback_to(ways)
    made(tmp_path, callback, rows=rows, max_steps=1).train()
    assert [values["train/loss"] for values in logged(ways) if "train/loss" in values] == [0.0], "the filter's number"
    for message in ways.of(Losses):
        assert message.losses.size == message.labelled > 0
        assert np.isnan(message.losses).all()
        assert np.isnan(message.trainer_loss).all()
    assert sum(message.nonfinite.sum() for message in ways.of(Gradients)) > 0
    callback.close()


def test_batches_without_a_label_are_counted_and_nothing_falls_over(tmp_path: Path, ways: Ways) -> None:
    rows = tiny.rows(8)
    for row in rows:
        row["labels"][:] = -100
    callback = callback_to(ways)
    made(tmp_path, callback, rows=rows, max_steps=2).train()
    assert callback.failures() == {}
    assert [(m.batches, m.batches_without_labels, m.labelled) for m in ways.of(Answers)] == [(2, 2, 0)] * 2
    assert [(m.labelled, m.losses.size) for m in ways.of(Losses)] == [(0, 0)] * 4
    callback.close()


def test_epochs_are_the_trainers(tmp_path: Path, ways: Ways) -> None:
    callback = callback_to(ways)
    made(tmp_path, callback, max_steps=-1, num_train_epochs=2).train()
    assert [(end.step, end.epoch) for end in ways.of(StepEnd)] == [(s, (s - 1) // 4) for s in range(1, 9)]
    assert [message.epoch for message in ways.of(Answers)] == [0] * 4 + [1] * 4
    callback.close()


def logged(ways: Ways) -> list[dict[str, Any]]:
    return [dict(message.values) for message in ways.of(Scalars)]


def test_a_second_training_is_another_run_and_a_broken_one_goes_on_in_its_own(tmp_path: Path, ways: Ways) -> None:
    class Breaking(Recording):
        broken = False

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.broken:
                raise RuntimeError("out of memory")
            return super().training_step(*args, **kwargs)

    callback = callback_to(ways)
    trainer = made(tmp_path, callback, kind=Breaking)
    trainer.train()
    assert "compute_loss" not in vars(trainer)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    trainer.evaluate()
    assert any("eval/loss" in values for values in logged(ways)), "the run is still open for it"
    trainer.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.broken = False
    trainer.train()
    callback.close()
    first, broken, mended = (way.identity for way in ways.opened)
    assert first.run_id != broken.run_id == mended.run_id
    assert broken.incarnation != mended.incarnation
    assert [way.closed for way in ways.opened] == ["0", "0", "0"]
    assert [end.step for end in ways.of(StepEnd)] == [1, 2, 3]
    assert callback.failures() == {}


def test_a_checkpoint_leads_back_to_its_run(tmp_path: Path, ways: Ways) -> None:
    callback = callback_to(ways)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    made(tmp_path, callback, **saving).train()
    callback.close()
    run_id = ways.opened[0].identity.run_id
    again = callback_to(ways)
    for restored in (False, True):
        trainer = made(tmp_path, again, **saving, restore_callback_states_from_checkpoint=restored)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert ways.opened[-1].identity.run_id == run_id
        assert ways.opened[-1].hello.start_step == 3
        assert [end.step for end in ways.of(StepEnd)] == [3, 4]
        assert trainer.state.stateful_callbacks[STATE_KEY] == {"run_id": run_id, "step": 4, "epoch": 0}
    again.close()
    other = callback_to(ways, run_id="mine")
    made(tmp_path, other, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ways.opened[-1].identity.run_id == "mine"
    other.close()


def test_a_checkpoint_of_a_training_without_the_callback_can_be_resumed_with_it(tmp_path: Path, ways: Ways) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    made(tmp_path, None, **saving).train()
    callback = callback_to(ways)
    made(tmp_path, callback, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [end.step for end in ways.of(StepEnd)] == [3, 4]
    callback.close()


def test_a_failing_measurement_does_not_reach_the_training(
    tmp_path: Path, ways: Ways, capfd: pytest.CaptureFixture[str]
) -> None:
    class Odd(Recording):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs).as_subclass(Unmeasurable)

    class Unmeasurable(torch.Tensor):
        def detach(self) -> Any:
            if self.is_leaf:
                return super().detach()
            raise ArithmeticError("not this one")

    callback = callback_to(ways)
    trainer = made(tmp_path, callback, kind=Odd, max_steps=1)
    trainer.training_step = plain_training_step.__get__(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
    assert callback.failures() == {"tell_batch": 2}
    assert capfd.readouterr().err.count("not this one") == 1
    assert [end.step for end in ways.of(StepEnd)] == [1]
    callback.close()


def plain_training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
    model.train()
    loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
    self.accelerator.backward(loss)
    return torch.zeros(())


def test_what_is_wrong_is_said_before_the_first_step(tmp_path: Path, ways: Ways) -> None:
    with pytest.raises(TypeError, match="not str; sidestep"):
        made(tmp_path, callback_to(ways, samples=["what is this?"])).train()
    with pytest.raises(TypeError, match="config must be a HooksConfig"):
        callback_to(ways, config={"lr_interval": 5})
    with pytest.raises(TypeError, match="run_config must be a mapping"):
        callback_to(ways, run_config=["lr"])


def test_switched_off_it_leaves_everything_alone(tmp_path: Path, ways: Ways) -> None:
    callback = callback_to(ways, config=sidestep.HooksConfig(log_wandb=False))
    trainer = made(tmp_path, callback)

    class Looking(transformers.TrainerCallback):  # type: ignore[misc]  # its types are not read
        wrapped: set[str] = set()  # noqa: RUF012  (one instance)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.wrapped |= {"compute_loss", "clip_grad_norm_"} & {*vars(trainer), *vars(trainer.accelerator)}

    trainer.add_callback(Looking)
    trainer.train()
    assert Looking.wrapped == set()
    assert ways.opened == []
    assert STATE_KEY not in trainer.state.stateful_callbacks
    callback.close()


def test_without_a_trainer_among_the_callers_it_says_what_it_cannot_see(
    ways: Ways, capfd: pytest.CaptureFixture[str]
) -> None:
    """Some loops call callbacks themselves: model and optimizer are then all that there is."""
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callback = callback_to(ways)
    args, state, control = None, transformers.TrainerState(), transformers.TrainerControl()
    callback.on_train_begin(args, state, control, model=model, optimizer=optimizer, processing_class=tiny.tokenizer())
    callback.on_epoch_begin(args, state, control)
    model.train()
    model(**tiny.collate(tiny.rows(2))).loss.backward()
    optimizer.step()
    state.global_step = 1
    callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    callback.close()
    assert [message.clipped for message in ways.of(Gradients)] == [True]
    assert len(ways.of(Losses)) == 1
    assert "pass it as TrainerCallback(trainer=trainer)" in capfd.readouterr().err.replace("Pass", "pass")
    assert callback.failures() == {}
    assert not [notice for notice in ways.of(Notice) if notice.level == "error"]
