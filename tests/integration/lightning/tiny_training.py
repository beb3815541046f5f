"""A language model of three layers that returns (logits, loss), rows for it, and the plain loop to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sidestep
from sidestep.protocol.messages import Answers, Generation, Gradients, LearningRates, Losses, Tokens
from sidestep.trainer_hooks.transport import InProcessTransport

V, D, T, EOS, PAD = 19, 8, 10, 0, 1
NUM_STEPS, ACCUMULATION, BATCH_SIZE, MAX_NORM = 24, 2, 4, 0.3
NUM_BATCHES = NUM_STEPS * ACCUMULATION // 2
"""Two epochs."""
BATCH_INTERVAL, GRADIENT_INTERVAL, GENERATION_INTERVAL = 3, 4, 8
FAMILIES = (Tokens, Losses, Gradients, Answers, LearningRates, Generation)

Row = dict[str, torch.Tensor]


class Network(nn.Module):
    """Sums of embeddings, a layer, dropout, a head."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(D, V)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        logits = self.head(self.drop(torch.tanh(self.mix(hidden.cumsum(1)))))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100)
        return logits, loss


class Words:
    """A tokenizer: numbers as words."""

    eos_token_id, pad_token_id = EOS, PAD

    def __len__(self) -> int:
        return V

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)


def network(dropout: float = 0.0) -> Network:
    """The same weights every time; with dropout they end as they do only if nobody else draws random numbers."""
    torch.manual_seed(0)
    return Network(dropout)


def rows(num_rows: int, seed: int = 1) -> list[Row]:
    """Prompts of three ids, answers of one to five with an EOS, padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(num_rows):
        length = int(torch.randint(1, 6, (1,), generator=generator))
        ids = torch.full((T,), PAD)
        ids[: 3 + length] = torch.randint(2, V, (3 + length,), generator=generator)
        ids[3 + length] = EOS
        labels = torch.full((T,), -100)
        labels[3 : 4 + length] = ids[3 : 4 + length]
        mask = (torch.arange(T) < 4 + length).long()
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


def loader(num_rows: int = NUM_BATCHES * BATCH_SIZE, seed: int = 1) -> Any:
    return torch.utils.data.DataLoader(rows(num_rows, seed), batch_size=BATCH_SIZE)  # type: ignore[arg-type]


def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def hooks_config(**more: Any) -> sidestep.HooksConfig:
    """Intervals that make every family due several times."""
    return sidestep.HooksConfig(**{
        "token_stats_interval": BATCH_INTERVAL,
        "loss_breakdown_interval": BATCH_INTERVAL,
        "lr_interval": BATCH_INTERVAL,
        "answer_length_interval": BATCH_INTERVAL,
        "gradient_log_interval": GRADIENT_INTERVAL,
        "generation_eval_interval": GENERATION_INTERVAL,
        "collapse_detection_interval": GENERATION_INTERVAL,
        "max_new_tokens": 4,
        **more,
    })  # fmt: skip


def samples() -> list[sidestep.Sample]:
    return [
        sidestep.Sample(question=f"q{i}", target="x", prompt_ids=row["input_ids"][:3], target_ids=row["input_ids"][3:5])
        for i, row in enumerate(rows(3, seed=2))
    ]


def generate(model: Any, asked: Any, max_new_tokens: int) -> list[list[int]]:
    """Continue each prompt greedily."""
    made = []
    model = getattr(model, "network", model)
    for sample in asked:
        ids = [int(i) for i in sample.prompt_ids]
        start = len(ids)
        for _ in range(max_new_tokens):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        made.append(ids[start:])
    return made


def to_attach() -> dict[str, Any]:
    """What every training here passes on."""
    return {"tokenizer": Words(), "samples": samples(), "generate_fn": generate, "config": hooks_config()}


OVERFLOWING_SCALE = 2.0**24
"""So large that the first steps of a float16 training overflow, and are skipped."""


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=OVERFLOWING_SCALE, growth_interval=1000)


class Ways:
    """Opens in-process transports and remembers them."""

    def __init__(self) -> None:
        self.opened: list[InProcessTransport] = []

    def __call__(self, *arguments: Any) -> InProcessTransport:
        self.opened.append(InProcessTransport(*arguments))
        return self.opened[-1]

    def of(self, kind: type[Any], number: int = -1) -> list[Any]:
        return [message for message in self.opened[number].messages if isinstance(message, kind)]


def evaluate(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        losses = [float(model(**batch)[1]) for batch in loader(8, seed=3)]
    model.train()
    return sum(losses) / len(losses)


def updates(num_steps: int) -> Iterator[tuple[int, list[tuple[int, Row]]]]:
    """(step from 1, its micro-batches with their epoch)."""
    flat = [(epoch, batch) for epoch in range(2) for batch in loader()]
    for step in range(num_steps):
        yield step + 1, flat[step * ACCUMULATION : (step + 1) * ACCUMULATION]


def plain_loop(
    ways: Ways | None,
    *,
    first_step: int = 1,
    clip_is_seen: bool = False,
    dtype: torch.dtype | None = None,
    scaler: Any = None,
    scale_is_seen: bool = False,
) -> tuple[Network, list[Any]]:
    """Train with explicit calls and return the model and (ids, labels, mask, logits, loss) of each micro-batch."""
    scaler = scaler if scaler is not None else torch.amp.GradScaler("cpu", enabled=False)
    model = network()
    optimizer, scheduler = optimizer_of(model)
    hooks = None
    if ways is not None:
        hooks = sidestep.attach(model, optimizer, step=first_step, scaler=scaler, transport=ways, **to_attach())
    raw = []
    for step, batches in updates(NUM_STEPS):
        optimizer.zero_grad()
        for epoch, batch in batches:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                logits, loss = model(**batch)
            scaler.scale(loss / ACCUMULATION).backward()
            raw.append((*(batch[name].numpy() for name in ("input_ids", "labels", "attention_mask")),
                        logits.detach().double().numpy(), float(loss.detach())))  # fmt: skip
            if hooks is not None:
                hooks.on_batch(logits=logits, loss=loss, epoch=epoch, **batch)  # type: ignore[arg-type]  # its names fit
        if hooks is not None and scale_is_seen:
            hooks.before_clip()
        scaler.unscale_(optimizer)
        if hooks is not None and not clip_is_seen and not scale_is_seen:
            hooks.before_clip()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if hooks is not None:
            hooks.after_step(step - 1 + first_step)
    if hooks is not None:
        hooks.close()
        assert hooks.failures() == {}
    return model, raw


def as_compared(message: Any, without: tuple[str, ...]) -> dict[str, Any]:
    fields = {name: getattr(message, name) for name in type(message).__dataclass_fields__ if name not in without}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def differences(ways: Ways, other: Ways, *, without: tuple[str, ...] = ("seconds",)) -> list[tuple[str, Any, Any]]:
    """Every field of every message of every family that is not the same in both; floats may be 1e-6 apart."""
    found = []
    for kind in FAMILIES:
        mine, others = ways.of(kind), other.of(kind)
        assert others, f"nothing of {kind.__name__} to compare with"
        assert len(mine) == len(others), kind.__name__
        for one, two in zip(mine, others, strict=True):
            left, right = as_compared(one, without), as_compared(two, without)
            found += [(f"{kind.__name__}.{k}", left[k], right[k]) for k in left if not _close(left[k], right[k])]
    return found


def _close(one: Any, two: Any) -> bool:
    if isinstance(one, float) or (isinstance(one, list) and any(isinstance(value, float) for value in one)):
        return np.shape(one) == np.shape(two) and bool(np.allclose(one, two, rtol=1e-6, atol=1e-9, equal_nan=True))
    return bool(one == two)


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    pairs: Callable[[nn.Module], Any] = lambda model: model.state_dict()  # noqa: E731
    return all(torch.equal(value, pairs(two)[name]) for name, value in pairs(one).items())
