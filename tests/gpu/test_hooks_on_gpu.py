"""Every hook call in a training loop while CUDA raises on whatever would wait for the device.

Generation is left out: it decodes token by token and is the documented exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sidestep.protocol.messages import Answers, Gradients, LearningRates, Losses, Scalars, StepEnd, Tokens
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.hooks import attach
from sidestep.trainer_hooks.transport import InProcessTransport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

V, D, B, T, IGNORED, EOS, PAD = 64, 32, 4, 24, -100, 1, 0
STEPS, ACCUMULATION = 4, 2
ALWAYS = HooksConfig(
    token_stats_interval=1, loss_breakdown_interval=1, gradient_log_interval=1, lr_interval=1, answer_length_interval=1,
    generation_eval_interval=0, collapse_detection_interval=0, loss_rows_per_microbatch=B * T, eos_id=EOS, pad_id=PAD,
)  # fmt: skip


class Model(nn.Module):
    """Text only, without one synchronising operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.inner = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=False)

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.tanh(self.inner(self.embedding(input_ids)))
        return made

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, targets: Any = None) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return logits, loss


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def batches() -> list[SimpleNamespace]:
    drawn = torch.Generator().manual_seed(0)
    made = []
    for _ in range(STEPS * ACCUMULATION):
        ids = torch.randint(2, V, (B, T), generator=drawn)
        labels = torch.full_like(ids, IGNORED)
        labels[:, 5:9] = ids[:, 6:10]
        labels[:, 9] = EOS
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        host = SimpleNamespace(ids=ids, labels=labels, mask=mask)
        made.append(SimpleNamespace(host=host, ids=ids.cuda(), labels=labels.cuda(), mask=mask.cuda()))
    return made


class Ways:
    def __init__(self) -> None:
        self.opened: InProcessTransport | None = None

    def __call__(self, *given: Any) -> InProcessTransport:
        self.opened = InProcessTransport(*given)
        return self.opened

    def messages(self) -> list[Any]:
        assert self.opened is not None
        torch.cuda.synchronize()
        return self.opened.messages


def expected_losses(model: Model, batch: SimpleNamespace) -> torch.Tensor:
    with torch.no_grad():
        logits = model.lm_head(model.hidden(batch.ids)).double()
        chosen = batch.labels != IGNORED
        return F.cross_entropy(logits[chosen], batch.labels[chosen], reduction="none").cpu()


@pytest.mark.parametrize("told", ["nothing", "host", "device", "token_losses", "hidden"])
def test_no_call_waits_for_the_device_and_the_numbers_are_right(batches: list[SimpleNamespace], told: str) -> None:
    torch.manual_seed(0)
    model = Model().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ways = Ways()
    hooks = attach(model, optimizer, config=ALWAYS, transport=ways)
    wanted: list[torch.Tensor] = []
    queue = iter(batches)
    for step in range(STEPS):
        for _ in range(ACCUMULATION):
            batch = next(queue)
            wanted.append(expected_losses(model, batch))
            with no_waiting():
                logits, loss = model(batch.ids, attention_mask=batch.mask, targets=batch.labels)
                show(hooks, model, batch, (logits, loss), told=told)
                (loss / ACCUMULATION).backward()
        with no_waiting():
            if told != "nothing":
                hooks.before_clip()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if told != "nothing":
                hooks.log({"own": loss.detach(), "plain": 1.0}, step=step)
                hooks.after_step(step)
    hooks.close()
    assert hooks.failures() == {}
    messages = ways.messages()
    check(messages, batches, wanted, told)


def show(hooks: Any, model: Model, batch: SimpleNamespace, output: Any, *, told: str) -> None:
    logits, loss = output
    if told == "host":
        host = batch.host
        hooks.on_batch(input_ids=host.ids, labels=host.labels, attention_mask=host.mask, loss=loss, epoch=0)
    elif told == "device":
        hooks.on_batch(
            input_ids=batch.ids, labels=batch.labels, attention_mask=batch.mask, logits=logits, loss=loss, epoch=0
        )
    elif told == "token_losses":
        own = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none")
        hooks.on_batch(
            input_ids=batch.ids, labels=batch.labels, attention_mask=batch.mask, token_losses=own.view(B, T), epoch=0
        )
    elif told == "hidden":
        hooks.on_batch(
            input_ids=batch.ids, labels=batch.labels, attention_mask=batch.mask, hidden=model.hidden(batch.ids),
            head=model.lm_head, epoch=0,
        )  # fmt: skip


def check(messages: list[Any], batches: list[SimpleNamespace], wanted: list[torch.Tensor], told: str) -> None:
    losses = [message for message in messages if isinstance(message, Losses)]
    assert len(losses) == STEPS * ACCUMULATION
    for message, values in zip(losses, wanted, strict=True):
        np.testing.assert_allclose(message.losses, values.numpy(), rtol=1e-5, atol=1e-6)
        assert message.labelled == len(values)
    tokens: list[Any] = [message for message in messages if isinstance(message, Tokens)]
    for counted, batch in zip(tokens, batches, strict=True):
        ids, counts = np.unique(batch.host.ids[batch.host.mask != 0].numpy(), return_counts=True)
        assert counted.real_ids.tolist() == ids.tolist()
        assert counted.real_counts.tolist() == counts.tolist()
        assert (counted.padding, counted.answers) == (4, B)
    answers = [message for message in messages if isinstance(message, Answers)]
    assert [message.lengths.tolist() for message in answers] == [[4]] * STEPS
    assert [message.counts.tolist() for message in answers] == [[B * ACCUMULATION]] * STEPS
    gradients = [message for message in messages if isinstance(message, Gradients)]
    assert [message.clipped for message in gradients] == [told == "nothing"] * STEPS
    assert [message.rates.tolist() for message in messages if isinstance(message, LearningRates)] == [[1e-2]] * STEPS
    assert len([message for message in messages if isinstance(message, Scalars)]) == (0 if told == "nothing" else STEPS)
    ends = [message for message in messages if isinstance(message, StepEnd)]
    assert [end.step for end in ends] == list(range(STEPS))
    assert not any(end.dropped for end in ends)


def test_a_scalers_factor_is_shipped_not_read(batches: list[SimpleNamespace]) -> None:
    torch.manual_seed(0)
    model = Model().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
    ways = Ways()
    hooks = attach(model, optimizer, config=ALWAYS, transport=ways, scaler=scaler)
    batch = batches[0]
    with torch.autocast("cuda", dtype=torch.float16):
        _, loss = model(batch.ids, attention_mask=batch.mask, targets=batch.labels)
    scaler.scale(loss).backward()
    with no_waiting():
        hooks.before_clip()
    scaler.step(optimizer)  # reads the device on the trainer's own account
    scaler.update()
    with no_waiting():
        hooks.after_step(0)
    hooks.close()
    assert hooks.failures() == {}
    assert [message.scale for message in ways.messages() if isinstance(message, Gradients)] == [128.0]


def test_losses_and_weights_are_bit_identical_on_the_device(
    batches: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [train(batches, hooked=hooked) for hooked in (False, False, True)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0][0] == runs[1][0]
    assert runs[0][0] == runs[2][0]
    for one, other in zip(runs[0][1], runs[2][1], strict=True):
        assert torch.equal(one, other)


def train(batches: list[SimpleNamespace], *, hooked: bool) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Model().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    hooks = attach(model, optimizer, config=ALWAYS, transport=Ways()) if hooked else None
    losses = []
    for batch in batches:
        _, loss = model(batch.ids, attention_mask=batch.mask, targets=batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if hooks is not None:
        hooks.close()
        assert hooks.failures() == {}
    return losses, [parameter.detach().clone() for parameter in model.parameters()]
