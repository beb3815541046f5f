"""nanoVLM's adapter on the demo's model, which keeps nanoVLM's contract, in a loop shaped like its train.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import reference

from sidestep.examples.digits_vqa.packing import Batch
from sidestep.examples.digits_vqa.settings import Settings
from sidestep.examples.digits_vqa.training import Training, build
from sidestep.protocol.messages import (
    Answers,
    Generation,
    Gradients,
    LearningRates,
    Losses,
    Message,
    Scalars,
    StepEnd,
    Tokens,
)
from sidestep.protocol.tables import decode_table
from sidestep.trainer_hooks.integrations import nanovlm as sidestep
from sidestep.trainer_hooks.transport import InProcessTransport

NUM_STEPS = 4


@dataclass
class TrainConfig:
    """The fields of nanoVLM's that the adapter reads."""

    gradient_accumulation_steps: int = 1
    generation_eval_interval: int = 0
    collapse_detection_interval: int = 0
    gradient_log_interval: int = 1
    log_wandb: bool = True
    wandb_entity: str = "an-entity"
    max_sample_length: int = 4096
    max_images_per_example: int = 4


@dataclass
class VLMConfig:
    lm_hidden_dim: int = 96
    vlm_extra_tokens: dict[str, str] = field(default_factory=lambda: {"image_token": "<|image|>"})


@dataclass
class Run:
    """What one training left."""

    losses: list[float]
    weights: torch.Tensor
    messages: list[Message]
    transport: InProcessTransport | None
    seen: list[list[reference.RawBatch]]
    gradients: list[dict[str, Any]]
    failures: dict[str, int]

    def of(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.messages if isinstance(message, kind)]


class NoHooks:
    """Train.py as it is: the lines are not there."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None


def train(*, hooked: bool, accumulation: int = 1, wrap: Callable[[Any], Any] = lambda model: model) -> Run:
    """Train as train.py does: its names, its order, its evaluation that binds batch, labels and loss anew."""
    training: Training = build(Settings(num_steps=NUM_STEPS, accumulation_steps=accumulation, batch_size=2))
    optimizer, bare = training.optimizer, training.model
    model = wrap(bare)
    train_cfg = TrainConfig(gradient_accumulation_steps=accumulation, gradient_log_interval=accumulation)
    opened: list[InProcessTransport] = []
    hooks: Any = NoHooks()
    if hooked:
        hooks = sidestep.attach(
            model, optimizer, None, VLMConfig(), train_cfg, name="tiny", tokenizer=training.tokenizer,
            transport=remembered(opened), token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1,
        )  # fmt: skip
    batches, validation = iter(training.loader), iter(build(Settings(batch_size=2, seed=9)).loader)
    found = Run([], torch.empty(0), [], None, [], [], {})
    model.train()
    for global_step in range(NUM_STEPS):
        found.seen.append([])
        for _ in range(accumulation):
            batch = next(batches)
            logits, loss = forward(model, batch)
            hooks.on_batch(batch, 1)
            found.seen[-1].append(raw(batch, logits, loss))
            found.losses.append(loss.item())
            loss = loss / accumulation
            loss.backward()  # type: ignore[no-untyped-call]
        hooks.before_clip()
        found.gradients.append(
            {name: p.grad.numpy().copy() for name, p in bare.named_parameters() if p.grad is not None}
        )
        grad_norm = torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            batch = next(validation)
            logits, loss = forward(model, batch)
            hooks.log({"val_loss": loss.item()}, step=global_step)
        model.train()
        hooks.log({"batch_loss": found.losses[-1], "grad_norm": grad_norm}, step=global_step)
        hooks.after_step(global_step)
    found.weights = torch.cat([p.detach().flatten() for p in bare.parameters()])
    if hooked:
        found.failures = hooks.hooks.failures()
        hooks.summary["avg_epoch_time"] = 1.5
        hooks.finish()
        [found.transport] = opened
        found.messages = list(opened[0].messages)
    return found


def forward(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What lies on a device is a copy of the collator's tensors; on the CPU ``to`` would give the same ones."""
    labels, input_ids = batch["labels"].clone(), batch["input_ids"].clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(input_ids, batch["images"], attention_mask=batch["attention_mask"], targets=labels)
    return logits, loss


def remembered(opened: list[InProcessTransport]) -> Callable[..., InProcessTransport]:
    def way(*given: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*given))
        return opened[-1]

    return way


def raw(batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> reference.RawBatch:
    return reference.RawBatch(
        input_ids=batch["input_ids"].numpy().copy(),
        labels=batch["labels"].numpy().copy(),
        mask=batch["attention_mask"].numpy().copy(),
        logits=logits.detach().double().numpy(),
        loss=float(loss.detach()),
        shifted=True,
    )


def eagerly(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.fixture(scope="module", params=["plain", "accumulated", "compiled"])
def runs(request: pytest.FixtureRequest) -> Iterator[tuple[Run, Run]]:
    chosen: dict[str, dict[str, Any]] = {"plain": {}, "accumulated": {"accumulation": 3}, "compiled": {"wrap": eagerly}}
    torch.set_num_threads(1)
    yield train(hooked=False, **chosen[request.param]), train(hooked=True, **chosen[request.param])
    torch.compiler.reset()


def test_losses_and_weights_are_those_of_the_run_without(runs: tuple[Run, Run]) -> None:
    off, on = runs
    assert off.losses == on.losses
    assert torch.equal(off.weights, on.weights)
    assert on.failures == {}


def test_losses_are_those_of_the_training_batches_though_every_step_evaluates(runs: tuple[Run, Run]) -> None:
    on = runs[1]
    by_step: dict[int, list[Losses]] = {}
    for message in on.of(Losses):
        by_step.setdefault(message.step, []).append(message)
    assert sorted(by_step) == list(range(NUM_STEPS))
    for step, batches in enumerate(on.seen):
        expected = [
            loss for batch in batches for answer in reference.answers_of(batch, eos=-1) for loss in answer.losses
        ]
        told = np.concatenate([np.asarray(message.losses, np.float64) for message in by_step[step]])
        np.testing.assert_allclose(np.sort(told), np.sort(expected), rtol=1e-5, atol=1e-6)


def test_answers_and_tokens_are_those_of_the_collators_tensors(runs: tuple[Run, Run]) -> None:
    on = runs[1]
    assert len({message.step for message in on.of(Tokens)}) == NUM_STEPS
    assert len(on.of(Answers)) >= NUM_STEPS
    assert {end.epoch for end in on.of(StepEnd)} == {1}


def test_gradients_are_unclipped_and_stand_under_three_modules(runs: tuple[Run, Run]) -> None:
    on = runs[1]
    assert on.transport is not None
    tables = {name: decode_table(on.transport.blobs[digest]) for name, digest in on.transport.hello.tables.items()}
    parameters: Any = tables["parameters"]
    assert set(parameters["modules"]) == {"vision_encoder", "modality_projector", "decoder"}
    assert tables["groups"] == {"names": ["modality_projector", "vision_encoder", "language_model"]}
    names = [row["name"] for row in parameters["parameters"]]
    assert not [name for name in names if "_orig_mod" in name]
    for step, message in enumerate(on.of(Gradients)):
        assert not message.clipped
        largest = {names[row]: top for row, top in zip(message.parameters, message.absmax, strict=True)}
        assert largest == {name: float(np.abs(gradient).max()) for name, gradient in on.gradients[step].items()}
    assert len(on.of(Gradients)) == NUM_STEPS
    assert len(on.of(LearningRates)) == NUM_STEPS


def test_the_run_has_its_names_and_both_configurations(runs: tuple[Run, Run]) -> None:
    transport = runs[1].transport
    assert transport is not None
    hello = transport.hello
    assert (hello.project, hello.entity, hello.name) == ("nanoVLM", "an-entity", "tiny")
    config: Mapping[str, Any] = hello.run_config
    assert config["VLMConfig"]["vlm_extra_tokens"] == {"image_token": "<|image|>"}
    assert config["TrainConfig"]["log_wandb"] is True
    assert hello.settings["gradient_log_interval"] == 1
    assert hello.settings["shifted"] is True


def test_what_train_py_logs_stands_at_its_step(runs: tuple[Run, Run]) -> None:
    logged: dict[int, dict[str, Any]] = {}
    for message in runs[1].of(Scalars):
        logged.setdefault(message.step, {}).update(message.values)
    for step in range(NUM_STEPS):
        assert {"val_loss", "batch_loss", "grad_norm"} <= set(logged[step])
    assert logged[NUM_STEPS]["avg_epoch_time"] == 1.5


def attached(**changed: Any) -> tuple[sidestep.NanoVLMHooks, list[InProcessTransport], Training]:
    training = build(Settings(batch_size=2))
    opened: list[InProcessTransport] = []
    plain = {"tokenizer": training.tokenizer, "transport": remembered(opened), "train_cfg": TrainConfig()}
    return sidestep.attach(training.model, training.optimizer, **{**plain, **changed}), opened, training


def test_lmms_eval_stands_on_its_own_axis() -> None:
    hooks, opened, _ = attached()
    hooks.log({"lmms_eval/mmstar": 0.25, "<lmms-eval-step>": 400, "beside": 1.0}, step=900)
    hooks.define_metric("probe/*", step_metric="probe-step")
    hooks.log({"probe/a": 2.0, "probe-step": 7})
    hooks.after_step(900)
    told = {(m.step_key, m.key_step): dict(m.values) for m in opened[0].messages if isinstance(m, Scalars)}
    assert told["<lmms-eval-step>", 400] == {"lmms_eval/mmstar": 0.25}
    assert told["probe-step", 7] == {"probe/a": 2.0}
    assert [values for values in told.values() if "beside" in values] == [{"beside": 1.0}]
    hooks.finish()


def test_no_call_raises_whatever_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    hooks, _, _ = attached()
    hooks.on_batch({})
    hooks.log({"odd": object(), "<lmms-eval-step>": "four", "lmms_eval/x": 1.0})
    hooks.after_step(0)
    hooks.close()
    hooks.finish()
    assert "left out: odd" in capsys.readouterr().err


def test_without_log_wandb_nothing_is_prepared_and_nothing_happens() -> None:
    class Untouched:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    hooks, opened, training = attached(train_cfg=TrainConfig(log_wandb=False), val_loader=Untouched())
    hooks.on_batch(next(iter(training.loader)))
    hooks.before_clip()
    assert hooks.after_step(0) is None
    hooks.finish()
    assert opened == []


def test_intervals_of_the_train_config_count_micro_batches() -> None:
    config = TrainConfig(gradient_accumulation_steps=8, gradient_log_interval=8 * 30, generation_eval_interval=0)
    hooks, opened, _ = attached(train_cfg=config, max_new_tokens=7)
    hooks.log({"a": 1})
    assert opened[0].hello.settings["gradient_log_interval"] == 30
    assert opened[0].hello.settings["max_new_tokens"] == 7
    hooks.close()


def test_the_default_tokenizer_is_the_models_own() -> None:
    training = build(Settings(batch_size=2))
    training.model.tokenizer = training.tokenizer  # type: ignore[assignment]
    config = TrainConfig(generation_eval_interval=1)
    opened: list[InProcessTransport] = []
    loader: Any = training.loader
    before = torch.get_rng_state(), loader.generator.get_state()
    hooks = sidestep.attach(
        training.model, training.optimizer, loader, None, config,
        transport=remembered(opened), generation_samples=3, max_new_tokens=4,
    )  # fmt: skip
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], loader.generator.get_state())
    hooks.after_step(0)
    [generation] = [m for m in opened[0].messages if isinstance(m, Generation)]
    assert len(generation.samples) == 3
    assert not len(generation.failed)
    hooks.close()
