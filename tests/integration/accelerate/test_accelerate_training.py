"""A loop of Accelerate's, watched by ``attach`` alone: messages as by explicit calls, weights as without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")

import accelerate
import torch
from accelerate.state import AcceleratorState, GradientState
from tests.integration.lightning import tiny_training as tiny

import sidestep
from sidestep.protocol.messages import Gradients, Losses, StepEnd, Tokens

NOT_TOLD = ("clipped", "epoch", "seconds")
"""Explicit calls tell that nothing was clipped yet, and the epoch; ``attach`` alone sees neither."""


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its state in classes."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(ways: tiny.Ways | None, *, dropout: float = 0.0, **more: Any) -> tuple[tiny.Network, list[float]]:
    """As Accelerate's guide writes it; with hooks, one line after ``prepare``."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=tiny.ACCUMULATION, **more)
    made = tiny.network(dropout)
    plain_optimizer, plain_scheduler = tiny.optimizer_of(made)
    model, optimizer, batches, scheduler = accelerator.prepare(made, plain_optimizer, tiny.loader(), plain_scheduler)
    hooks = None
    if ways is not None:
        hooks = sidestep.attach(
            model, optimizer, step=1, scaler=accelerator.scaler, transport=ways, **tiny.to_attach()
        )  # fmt: skip
    losses = []
    for _ in range(2):
        for number, batch in enumerate(batches):
            with accelerator.accumulate(model):
                loss = model(**batch)[1]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), tiny.MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if number % 5 == 4:  # between micro-batches of one step, too
                tiny.evaluate(made)
    if hooks is not None:
        hooks.close()
        assert hooks.failures() == {}
    return made, losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_and_losses_are_those_without_the_hooks(precision: str) -> None:
    ways = tiny.Ways()
    alone, losses = train(None, dropout=0.1, mixed_precision=precision)
    watched, same_losses = train(ways, dropout=0.1, mixed_precision=precision)
    assert same_losses == losses
    assert tiny.same_weights(watched, alone)
    assert len(ways.of(StepEnd)) == tiny.NUM_STEPS


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_family_is_as_by_explicit_calls(precision: str) -> None:
    ways, other = tiny.Ways(), tiny.Ways()
    watched, _ = train(ways, mixed_precision=precision)
    model, _ = tiny.plain_loop(other, clip_is_seen=True, dtype=torch.bfloat16 if precision == "bf16" else None)
    assert tiny.same_weights(watched, model)
    assert [end.step for end in ways.of(StepEnd)] == list(range(1, tiny.NUM_STEPS + 1))
    assert [end.sent for end in ways.of(StepEnd)] == [end.sent for end in other.of(StepEnd)]
    assert tiny.differences(ways, other, without=NOT_TOLD) == []
    assert {message.clipped for message in ways.of(Gradients)} == {True}


def test_gradients_are_those_before_clipping_where_the_loop_says_so() -> None:
    """The documented line, ``hooks.before_clip()``, in a loop that clips by hand."""
    ways, other = tiny.Ways(), tiny.Ways()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=tiny.ACCUMULATION)
    made = tiny.network()
    plain_optimizer, plain_scheduler = tiny.optimizer_of(made)
    model, optimizer, batches, scheduler = accelerator.prepare(made, plain_optimizer, tiny.loader(), plain_scheduler)
    hooks = sidestep.attach(model, optimizer, step=1, transport=ways, **tiny.to_attach())
    step = 0
    for epoch in range(2):
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch)[1]
                hooks.on_batch(**batch, loss=loss, epoch=epoch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    hooks.before_clip()
                    accelerator.clip_grad_norm_(model.parameters(), tiny.MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                hooks.after_step(step)
    hooks.close()
    assert hooks.failures() == {}
    tiny.plain_loop(other)
    assert [m.clipped for m in ways.of(Gradients)] == [False] * (tiny.NUM_STEPS // tiny.GRADIENT_INTERVAL)
    gradients = [tiny.as_compared(message, ("seconds",)) for message in ways.of(Gradients)]
    assert gradients == [tiny.as_compared(message, ("seconds",)) for message in other.of(Gradients)]
    assert [end.epoch for end in ways.of(StepEnd)] == [end.epoch for end in other.of(StepEnd)]
    assert len(ways.of(Losses)) == len(other.of(Losses))


def test_accelerates_own_checkpoint_leads_back_to_the_run(tmp_path: Path) -> None:
    ways = tiny.Ways()
    for resumed in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        made = tiny.network()
        model, optimizer = accelerator.prepare(made, torch.optim.AdamW(made.parameters()))
        hooks = sidestep.attach(model, optimizer, transport=ways, config=tiny.hooks_config())
        accelerator.register_for_checkpointing(hooks)
        if resumed:
            accelerator.load_state(str(tmp_path / "saved"))
        for batch in list(tiny.loader())[:3]:
            accelerator.backward(model(**batch)[1])
            optimizer.step()
            hooks.after_step()
        if not resumed:
            accelerator.save_state(str(tmp_path / "saved"))
        hooks.close()
        assert hooks.failures() == {}
    first, second = ways.opened
    assert first.identity.run_id == second.identity.run_id
    assert [end.step for end in ways.of(StepEnd, 0)] == [0, 1, 2]
    assert [end.step for end in ways.of(StepEnd, 1)] == [3, 4, 5]


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_float16_with_a_scaler_is_seen_as_by_explicit_calls() -> None:
    """Accelerate makes a scaler for a GPU only; one of the CPU's goes the same way through its optimizer."""
    ways, other = tiny.Ways(), tiny.Ways()
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=tiny.ACCUMULATION,
        mixed_precision="fp16",
    )
    accelerator.scaler, accelerator.native_amp = tiny.scaler(), True
    made = tiny.network()
    plain_optimizer, scheduler = tiny.optimizer_of(made)
    model, optimizer, batches = accelerator.prepare(made, plain_optimizer, tiny.loader())
    hooks = sidestep.attach(
        model, optimizer, step=1, scaler=accelerator.scaler, transport=ways, **tiny.to_attach()
    )  # fmt: skip
    step = 0
    for epoch in range(2):
        for batch in batches:
            with accelerator.accumulate(model):
                logits, loss = model(**batch)
                hooks.on_batch(**batch, logits=logits, loss=loss, epoch=epoch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    hooks.before_clip()
                    accelerator.clip_grad_norm_(model.parameters(), tiny.MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                step += 1
                hooks.after_step(step)
    hooks.close()
    assert hooks.failures() == {}
    compared, _ = tiny.plain_loop(other, dtype=torch.float16, scaler=tiny.scaler(), scale_is_seen=True)
    applied = [end.applied for end in ways.of(StepEnd)]
    assert {True, False} == set(applied), "some steps overflow, some do not"
    assert applied == [end.applied for end in other.of(StepEnd)]
    assert tiny.same_weights(made, compared)
    assert tiny.differences(ways, other) == []


def test_attach_alone_adds_the_batches_of_a_skipped_step_to_the_next() -> None:
    """As documented: without ``after_step`` only the optimizer's own steps are seen, and a skipped one is none."""
    ways = tiny.Ways()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.scaler, accelerator.native_amp = tiny.scaler(), True
    made = tiny.network()
    model, optimizer, batches = accelerator.prepare(made, tiny.optimizer_of(made)[0], tiny.loader())
    with sidestep.attach(
        model, optimizer, scaler=accelerator.scaler, transport=ways, config=tiny.hooks_config(token_stats_interval=1)
    ) as hooks:
        skipped = 0
        for batch in batches:
            accelerator.backward(model(**batch)[1])
            optimizer.step()
            optimizer.zero_grad()
            skipped += int(optimizer.step_was_skipped)
    assert hooks.failures() == {}
    assert 0 < skipped < tiny.NUM_BATCHES
    assert len(ways.of(StepEnd)) == tiny.NUM_BATCHES - skipped
    assert sum(message.step == 0 for message in ways.of(Tokens)) == skipped + 1
