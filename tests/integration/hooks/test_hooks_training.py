from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sidestep.protocol.messages import Answers, Goodbye, Gradients, Losses, Message, Notice, Scalars, StepEnd, Tokens
from sidestep.protocol.tables import decode_table
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.hooks import attach
from sidestep.trainer_hooks.transport import InProcessTransport

OFTEN = HooksConfig(
    token_stats_interval=2, loss_breakdown_interval=2, gradient_log_interval=2, lr_interval=2, answer_length_interval=2,
    generation_eval_interval=5, collapse_detection_interval=5, max_new_tokens=6,
)  # fmt: skip
TINY_STEPS = 6


class Packed:
    """What the autograd graph saved, so that its end can be seen."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Ways:
    """Opens in-process transports and remembers them."""

    def __init__(self) -> None:
        self.opened: list[InProcessTransport] = []

    def __call__(self, *arguments: Any) -> InProcessTransport:
        self.opened.append(InProcessTransport(*arguments))
        return self.opened[-1]

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.opened[-1].messages if isinstance(message, kind)]


@pytest.fixture
def ways() -> Ways:
    return Ways()


def attached(trained: Any, tokenizer: Any, config: HooksConfig = OFTEN, **more: Any) -> Any:
    model = more.pop("model", trained.model)
    return attach(model, trained.optimizer, tokenizer=tokenizer, samples=trained.samples(), config=config, **more)


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_with_hooks_is_bit_for_bit_the_one_without(
    trainer: Callable[..., Any], tokenizer: Any, ways: Ways, explicit: bool, compiled: bool
) -> None:
    plain, hooked = trainer(), trainer()
    plain_call = torch.compile(plain.model, backend="eager") if compiled else plain.model
    plain.run(7, call=plain_call, explicit=explicit)
    state = torch.get_rng_state()
    torch.compiler.reset()
    hooked = trainer()
    call = torch.compile(hooked.model, backend="eager") if compiled else hooked.model
    with attached(hooked, tokenizer, model=call, transport=ways) as hooks:
        hooked.run(7, hooks, call=call, explicit=explicit)
    assert hooks.failures() == {}
    assert hooked.losses == plain.losses
    assert same_weights(hooked.weights(), plain.weights())
    assert torch.equal(torch.get_rng_state(), state)
    assert len([m for m in ways.opened[0].messages if m.kind.name == "GENERATION"]) == 2


def test_over_a_socket_every_step_arrives_whole(trainer: Callable[..., Any], tokenizer: Any, listener: Any) -> None:
    trained = trainer()
    config = {"lr": 3e-3, "out": Path("x"), "wandb_api_key": "s", "dtype": torch.bfloat16}
    with attached(trained, tokenizer, endpoint=listener.address, run_config=config, project="p", tags=["a"]) as hooks:
        trained.run(TINY_STEPS, hooks)
        hooks.log({"val_loss": torch.tensor(1.5), "note": "x"}, step=TINY_STEPS - 1)
    messages = listener.until_goodbye()
    assert hooks.failures() == {}
    ends = [message for message in messages if isinstance(message, StepEnd)]
    assert [end.step for end in ends] == list(range(TINY_STEPS))
    for end in ends:
        parts = Counter(m.kind.name.lower() for m in messages if getattr(m, "step", -1) == end.step and not _is_mark(m))
        assert dict(parts) == dict(end.sent)
        assert not end.dropped
    assert Counter(end.sent.get("tokens", 0) for end in ends) == {2: 3, 0: 3}
    assert isinstance(messages[-1], Goodbye)
    [hello] = listener.hellos
    assert hello.run_config == {"lr": 3e-3, "out": "x", "wandb_api_key": "***", "dtype": "torch.bfloat16"}
    assert (hello.project, tuple(hello.tags), hello.start_step) == ("p", ("a",), 0)
    assert hello.capabilities["loss"] == "exact"
    assert "already shifted" in hello.capabilities["labels"]
    tables = {name: decode_table(listener.blobs[digest]) for name, digest in hello.tables.items()}
    assert tables["groups"]["names"] == ["modality_projector", "vision_encoder", "language_model"]
    assert len(tables["samples"]["samples"]) == 4
    assert tables["tokenizer"]["eos_id"] == 0
    assert {message.step_key: message for message in messages if isinstance(message, Scalars)}[
        ""
    ].key_step == TINY_STEPS - 1


def _is_mark(message: Message) -> bool:
    return isinstance(message, StepEnd | Notice | Scalars)


def _comparable(messages: list[Any]) -> list[Any]:
    wanted = ("TOKENS", "LOSSES", "ANSWERS", "LEARNING_RATES", "GENERATION")
    found = [m for m in messages if m.kind.name in wanted]
    found.sort(key=lambda m: (m.step, m.kind, getattr(m, "microstep", 0)))
    return [
        {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name in m.__dataclass_fields__
            if name != "seconds" and not isinstance(value := getattr(m, name), float)
        }
        for m in found
    ]


def test_attach_alone_sees_what_explicit_calls_say(trainer: Callable[..., Any], tokenizer: Any) -> None:
    seen = []
    for told in (False, True):
        trained, ways = trainer(), Ways()
        with attached(trained, tokenizer, transport=ways) as hooks:
            for step in range(TINY_STEPS):
                for _ in range(2):
                    batch = trained.batch()
                    _, loss = trained.model(
                        batch["input_ids"], batch["images"], batch["attention_mask"], targets=batch["labels"]
                    )
                    if told:
                        hooks.on_batch(
                            input_ids=batch["input_ids"], labels=batch["labels"], attention_mask=batch["attention_mask"]
                        )
                    loss.backward()
                if told:
                    hooks.before_clip()
                trained.optimizer.step()
                trained.optimizer.zero_grad()
                if told:
                    hooks.after_step(step)
        assert hooks.failures() == {}
        messages = ways.opened[0].messages
        assert [m.step for m in messages if isinstance(m, StepEnd)] == list(range(TINY_STEPS))
        assert {m.clipped for m in messages if isinstance(m, Gradients)} == {not told}
        gradients = [m.means.tolist() for m in messages if isinstance(m, Gradients)]
        seen.append((_comparable(messages), gradients))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 6 + 6 + TINY_STEPS + 3 + 2


def test_a_captured_batch_is_overridden_never_doubled(trainer: Callable[..., Any], tokenizer: Any, ways: Ways) -> None:
    trained = trainer()
    with attached(trained, tokenizer, HooksConfig(token_stats_interval=1), transport=ways) as hooks:
        for step in range(4):
            for micro in range(3):
                batch = trained.batch()
                trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])[1].backward()
                if step == 3 or micro == 2:  # told of the last one only, then of all
                    hooks.on_batch(input_ids=batch["input_ids"], labels=batch["labels"], shifted=True)
            trained.optimizer.step()
            hooks.after_step(step)
    assert Counter(m.step for m in ways.of(Tokens)) == dict.fromkeys(range(4), 3)
    assert [m.batches for m in ways.of(Answers)] == [3] * 4


def test_nothing_of_the_trainer_is_kept_alive(trainer: Callable[..., Any], tokenizer: Any, ways: Ways) -> None:
    trained = trainer()
    hooks = attached(trained, tokenizer, HooksConfig(token_stats_interval=1, loss_breakdown_interval=1), transport=ways)
    batch = trained.batch()
    packed: weakref.WeakSet[Packed] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Packed:
        made = Packed(tensor.detach())  # an output that is saved would hold its own graph
        packed.add(made)
        return made

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda made: made.tensor):
        logits, loss = trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])
    assert len(packed) > 0
    references = [weakref.ref(logits), weakref.ref(loss), weakref.ref(batch["labels"]), weakref.ref(batch["input_ids"])]
    hooks.on_batch(input_ids=batch["input_ids"], labels=batch["labels"], logits=logits, loss=loss)
    del batch, logits, loss
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    assert len(packed) == 0  # the graph is gone with what it saved
    model = weakref.ref(trained.model)
    hooks.close()
    del trained
    gc.collect()
    assert model() is None


def test_what_a_trainer_changes_afterwards_is_not_what_is_sent(
    trainer: Callable[..., Any], tokenizer: Any, ways: Ways
) -> None:
    trained = trainer()
    hooks = attached(trained, tokenizer, HooksConfig(token_stats_interval=1, loss_breakdown_interval=1), transport=ways)
    batch = trained.batch()
    logits, loss = trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])
    expected = loss.item()
    labels = batch["labels"].clone()
    hooks.on_batch(input_ids=batch["input_ids"], labels=batch["labels"], logits=logits.detach(), loss=loss.detach())
    loss.backward()
    with torch.no_grad():
        loss.mul_(0)
        batch["labels"].fill_(7)
        batch["input_ids"].fill_(7)
    trained.optimizer.step()
    hooks.after_step(0)
    [losses] = ways.of(Losses)
    assert losses.trainer_loss.tolist() == [pytest.approx(expected)]
    assert losses.target_ids.tolist() == labels[labels != -100].tolist()
    assert losses.losses.mean() == pytest.approx(expected, rel=1e-5)
    [tokens] = ways.of(Tokens)
    assert len(tokens.real_ids) > 1
    hooks.close()


def test_what_is_logged_goes_with_its_step_or_after_it(trainer: Callable[..., Any], tokenizer: Any, ways: Ways) -> None:
    trained = trainer()
    with attached(trained, tokenizer, transport=ways) as hooks:
        hooks.log({"early": 1}, step=0)
        trained.run(2, hooks)
        hooks.log({"late": 2.0}, step=1)
        hooks.log({"other/axis": torch.tensor(3)}, step=40, step_key="evaluation")
    logged = [(m.step, dict(m.values), m.step_key, m.key_step) for m in ways.of(Scalars)]
    assert logged == [(0, {"early": 1}, "", 0), (1, {"late": 2.0}, "", 1), (2, {"other/axis": 3}, "evaluation", 40)]
    assert [end.sent.get("scalars", 0) for end in ways.of(StepEnd)] == [1, 0]


def test_without_a_worker_nothing_raises_and_closing_is_bounded(
    trainer: Callable[..., Any], tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained, plain = trainer(), trainer()
    plain = trainer()
    plain.run(4)
    trained = trainer()
    hooks = attached(trained, tokenizer, HooksConfig(close_timeout_seconds=0.3), endpoint=f"ipc://{tmp_path}/nobody")
    trained.run(4, hooks)
    began = time.monotonic()
    hooks.close()
    hooks.close()
    hooks.on_batch(input_ids=torch.zeros(1, 2, dtype=torch.long))
    assert hooks.after_step(9) is None
    assert time.monotonic() - began < 5
    assert trained.losses == plain.losses
    assert "had not reached the worker" in capfd.readouterr().err


def test_mistakes_in_calls_are_counted_and_said_once(
    trainer: Callable[..., Any], tokenizer: Any, ways: Ways, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = trainer()
    hooks = attached(trained, tokenizer, transport=ways)
    for step in range(2):
        hooks.on_batch(logits=torch.zeros(2, 3, 4))
        hooks.on_batch(input_ids="not a tensor", labels=3)
        hooks.after_step(step)
    hooks.after_step(0)
    hooks.log("no map")
    hooks.close()
    assert hooks.failures() == {"on_batch": 4, "log": 1}
    shown = capfd.readouterr().err
    assert shown.count("a measurement failed in on_batch") == 1
    assert shown.count("after_step(0) came after step 1") == 1
    assert [end.step for end in ways.of(StepEnd)] == [0, 1]


def test_evaluation_forwards_are_none_of_ours(trainer: Callable[..., Any], tokenizer: Any, ways: Ways) -> None:
    trained = trainer()
    with attached(trained, tokenizer, HooksConfig(token_stats_interval=1), transport=ways):
        batch = trained.batch()
        trained.model.eval()
        trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])
        trained.model.train()
        with torch.no_grad():
            trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])
        trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])[1].backward()
        trained.optimizer.step()
    assert len(ways.of(Tokens)) == 1


def test_a_skipped_step_publishes_no_gradients_and_no_rate(
    trainer: Callable[..., Any], tokenizer: Any, ways: Ways
) -> None:
    trained = trainer()
    config = HooksConfig(gradient_log_interval=1, lr_interval=1)
    with attached(trained, tokenizer, config, transport=ways) as hooks:
        for step, applied in enumerate((True, False)):
            batch = trained.batch()
            trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])[1].backward()
            hooks.before_clip()
            if applied:
                trained.optimizer.step()
            hooks.after_step(step, applied=applied)
    assert [(end.applied, "gradients" in end.sent, "learning_rates" in end.sent) for end in ways.of(StepEnd)] == [
        (True, True, True),
        (False, False, False),
    ]


def test_a_scalers_factor_travels_with_the_gradients(trainer: Callable[..., Any], tokenizer: Any, ways: Ways) -> None:
    trained = trainer()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    with attached(trained, tokenizer, HooksConfig(gradient_log_interval=1), transport=ways, scaler=scaler) as hooks:
        for step in range(2):
            batch = trained.batch()
            loss = trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])[1]
            scaler.scale(loss).backward()
            if step == 1:
                scaler.unscale_(trained.optimizer)
            hooks.before_clip()
            scaler.step(trained.optimizer)
            scaler.update()
            hooks.after_step(step)
    assert [gradients.scale for gradients in ways.of(Gradients)] == [64.0, 1.0]


def test_what_a_scaler_skips_is_not_applied(trainer: Callable[..., Any], tokenizer: Any, ways: Ways) -> None:
    trained = trainer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with attached(trained, tokenizer, HooksConfig(gradient_log_interval=1), transport=ways, scaler=scaler) as hooks:
        batch = trained.batch()
        loss = trained.model(batch["input_ids"], batch["images"], targets=batch["labels"])[1] * float("inf")
        scaler.scale(loss).backward()
        scaler.step(trained.optimizer)
        scaler.update()
        hooks.after_step(0)
    assert [end.applied for end in ways.of(StepEnd)] == [False]


def test_a_resumed_training_goes_on_in_its_run(trainer: Callable[..., Any], tokenizer: Any, ways: Ways) -> None:
    first = trainer()
    hooks = attached(first, tokenizer, transport=ways)
    first.run(3, hooks)
    hooks.close()
    state = hooks.state_dict()
    assert state == {"run_id": ways.opened[0].identity.run_id, "step": 2, "epoch": 0}
    second = trainer()
    again = attached(second, tokenizer, transport=ways)
    again.load_state_dict(state)
    second.run(1, again, first=3)
    again.close()
    assert ways.opened[1].identity.run_id == state["run_id"]
    assert ways.opened[1].identity.incarnation != ways.opened[0].identity.incarnation
    assert ways.opened[1].hello.start_step == 3
    assert [end.step for end in ways.of(StepEnd)] == [3]


def test_a_live_wandb_run_is_warned_about_once(
    trainer: Callable[..., Any], tokenizer: Any, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb  # noqa: PLC0415

    trained = trainer()
    run = wandb.init(mode="disabled", project="x")
    try:
        with attached(trained, tokenizer, transport=ways) as hooks:
            trained.run(2, hooks)
    finally:
        run.finish()
    assert [notice.code for notice in ways.of(Notice)] == ["wandb"]


def test_log_wandb_false_does_nothing_at_all(trainer: Callable[..., Any], tokenizer: Any, ways: Ways) -> None:
    trained = trainer()
    with attached(trained, tokenizer, HooksConfig(log_wandb=False), transport=ways) as hooks:
        trained.run(1, hooks)
        hooks.log({"x": 1})
        hooks.load_state_dict({"run_id": "r", "step": 1})
    assert ways.opened == []
    assert not trained.model._forward_hooks
    assert hooks.run_id == ""
