"""Micro-batches that an epoch leaves over: their answers stay in the epoch that they were seen in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sidestep.protocol.messages import Answers, Message, StepEnd
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.hooks import attach
from sidestep.trainer_hooks.transport import InProcessTransport
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.metrics.answers import count_answers, measure_answers
from sidestep.worker.records import Part, RunContext

OFTEN = HooksConfig(token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1, answer_length_interval=1)
NEVER = HooksConfig(
    token_stats_interval=0, loss_breakdown_interval=0, lr_interval=0, gradient_log_interval=0, answer_length_interval=1
)
EPOCHS = [[0, 0], [0, 1, 1], [1, 1], [1, 2, 3, 3]]
"""Of the micro-batches of each step: the second and the fourth begin with what earlier epochs left over."""
ANSWERS_PER_BATCH = 3


class NoText:
    """Answers are counted without a tokenizer."""

    def token(self, token_id: int) -> str:
        raise AssertionError(token_id)

    def text(self, ids: Sequence[int]) -> str:
        raise AssertionError(ids)


CONTEXT = RunContext(run_id="r", attempt=0, text=NoText())


def trained(made: Any, config: HooksConfig, *, of_tensor: str = "cpu") -> list[Message]:
    opened: list[InProcessTransport] = []

    def way(*given: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*given))
        return opened[-1]

    with attach(made.model, made.optimizer, config=config, transport=way) as hooks:
        for step, epochs in enumerate(EPOCHS):
            for epoch in epochs:
                batch = made.batch()
                ids, labels = batch["input_ids"], batch["labels"]
                loss = made.model(ids, batch["images"], targets=labels)[1]
                hooks.on_batch(
                    input_ids=ids, labels=labels, shifted=True, documents=documents(ids, of_tensor), epoch=epoch
                )
                loss.backward()
            made.optimizer.step()
            made.optimizer.zero_grad()
            hooks.after_step(step)
        assert hooks.failures() == {}
    return list(opened[-1].messages)


def documents(ids: torch.Tensor, of_tensor: str) -> torch.Tensor | None:
    """With documents answers are counted on the training thread, without them on the publisher's."""
    return torch.zeros_like(ids) if of_tensor == "documents" else None


@pytest.mark.parametrize("config", [OFTEN, NEVER], ids=["due", "nothing-due"])
@pytest.mark.parametrize("counted", ["cpu", "documents"])
def test_a_step_sends_its_answers_epoch_by_epoch(
    trainer: Callable[..., Any], config: HooksConfig, counted: str
) -> None:
    messages = trained(trainer(), config, of_tensor=counted)
    found: dict[int, Counter[int]] = {}
    batches: dict[int, Counter[int]] = {}
    for message in messages:
        if isinstance(message, Answers):
            found.setdefault(message.step, Counter())[message.epoch] += int(message.counts.sum())
            batches.setdefault(message.step, Counter())[message.epoch] += message.batches
    assert batches == {step: Counter(epochs) for step, epochs in enumerate(EPOCHS)}
    assert found == {
        step: Counter({epoch: ANSWERS_PER_BATCH * count for epoch, count in Counter(epochs).items()})
        for step, epochs in enumerate(EPOCHS)
    }
    ends = {message.step: message for message in messages if isinstance(message, StepEnd)}
    assert [ends[step].sent["answers"] for step in range(len(EPOCHS))] == [1, 2, 1, 3]
    assert [ends[step].epoch for step in range(len(EPOCHS))] == [epochs[-1] for epochs in EPOCHS]


def test_the_worker_counts_each_answer_in_its_own_epoch(trainer: Callable[..., Any]) -> None:
    counts = AnswerCounts()
    assert counts.begin(0, 0)
    shown: dict[int, set[str]] = {}
    messages = trained(trainer(), NEVER)
    for end in [message for message in messages if isinstance(message, StepEnd)]:
        parts = [Part(rank=0, message=m) for m in messages if isinstance(m, Answers) and m.step == end.step]
        assert count_answers(parts, CONTEXT, 0, counts).malformed_parts == 0
        values = measure_answers(counts, end.epoch).values
        shown[end.step] = {key for key in values if key.startswith("data/answer_length_mean_epoch_")}
    in_all = Counter(epoch for epochs in EPOCHS for epoch in epochs)
    assert {epoch: sum(counts.lengths(epoch).values()) for epoch in (1, 2, 3)} == {
        epoch: ANSWERS_PER_BATCH * in_all[epoch] for epoch in (1, 2, 3)
    }
    assert shown == {
        step: {f"data/answer_length_mean_epoch_{epoch}" for epoch in epochs} for step, epochs in enumerate(EPOCHS)
    }
