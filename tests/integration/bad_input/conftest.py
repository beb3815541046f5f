"""A small training for every row of docs/bad_input.md, and what its console said, held against the page's words."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.worker_process import WorkerProcess
from torch import nn
from torch.nn import functional as F

from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.hooks import attach

PAGE = Path(__file__).resolve().parents[3] / "docs" / "bad_input.md"
NUM_IDS, NUM_POSITIONS, IGNORED, EOS = 9, 8, -100, 2
_ROW = re.compile(r"^\| \*\*(.+?)\*\* \| .+ \| ``? ?(.+?) ?``? \|$", re.MULTILINE)


class Told:
    """What the trainer's console has shown."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self._shown = ""

    def words(self, row: str) -> str:
        """A row's words on the page, as a pattern of a whole line; what stands in <brackets> is any text."""
        given = dict(_ROW.findall(PAGE.read_text(encoding="utf-8")))[row]
        return "^" + ".+?".join(map(re.escape, re.split(r"<[a-z ]+>", given))) + "$"

    def text(self) -> str:
        self._shown += self._capfd.readouterr().err
        return self._shown

    def once(self, row: str, timeout_seconds: float = 20.0) -> None:
        """Wait for a row's words as a line of their own; they stand there once."""
        pattern = re.compile(self.words(row), re.MULTILINE)
        deadline = time.monotonic() + timeout_seconds
        while not pattern.search(self.text()):
            assert time.monotonic() < deadline, f"{pattern.pattern!r} is not in {self.text()!r}"
            time.sleep(0.02)
        assert len(pattern.findall(self.text())) == 1

    def nothing(self) -> None:
        """No line of ours."""
        assert self.text() == ""


class Tokenizer:
    """One that a table of texts has to stand in for."""

    eos_token_id = EOS
    pad_token_id = 3

    def __len__(self) -> int:
        return NUM_IDS

    def decode(self, ids: list[int]) -> str:
        return "".join(f"t{i}" for i in ids)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(NUM_IDS, 4)
        self.lm_head = nn.Linear(4, NUM_IDS, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.lm_head(self.body(input_ids))
        if labels is None or labels.shape != input_ids.shape:
            return SimpleNamespace(logits=logits, loss=logits.square().mean())
        targets = labels[:, 1:].flatten()
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        return SimpleNamespace(logits=logits, loss=total / (targets != IGNORED).sum().clamp(min=1))


EVERY_STEP = {
    "generation_eval_interval": 1,
    "gradient_log_interval": 1,
    "collapse_detection_interval": 1,
    "token_stats_interval": 1,
    "loss_breakdown_interval": 1,
    "answer_length_interval": 1,
    "lr_interval": 1,
}


@dataclass
class Training:
    """A loop that makes every call unless it is told to forget some."""

    model: Any = field(default_factory=Model)
    optimizer: Any = None
    hooks: Any = None
    forgotten: frozenset[str] = frozenset()
    step: int = 0

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.optimizer = self.optimizer or torch.optim.SGD(self.model.parameters(), lr=0.1)

    def attach(self, **arguments: Any) -> Any:
        """Attach with every family due at every step."""
        config = HooksConfig(**{**EVERY_STEP, "close_timeout_seconds": 2.0, **arguments.pop("settings", {})})
        self.hooks = attach(self.model, self.optimizer, config=config, **arguments)
        return self.hooks

    def run(self, steps: int, make_labels: Callable[[torch.Tensor], torch.Tensor | None] = torch.clone) -> None:
        for _ in range(steps):
            ids = torch.randint(4, NUM_IDS, (2, NUM_POSITIONS))
            labels = make_labels(ids)
            output = self.model(ids, labels)
            if "on_batch" not in self.forgotten:
                self.hooks.on_batch(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))
            if output.loss.requires_grad:
                output.loss.backward()
            if "before_clip" not in self.forgotten:
                self.hooks.before_clip()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if "after_step" not in self.forgotten:
                self.hooks.after_step(self.step)
            self.step += 1


class Served:
    """One worker for a file's trainings."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.address = process.address

    def rows(self, hooks: Any) -> list[dict[str, Any]]:
        """Return the run's rows in the worker's outbox."""
        return [row for kind, row in self.entries(hooks) if kind == "row"]

    def entries(self, hooks: Any) -> list[tuple[str, dict[str, Any]]]:

        text = f"SELECT kind, payload FROM outbox WHERE run_id = '{hooks.run_id}' ORDER BY position"  # noqa: S608
        return [(kind, json.loads(payload)) for kind, payload in self.process.query(text)]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Told:
    return Told(capfd)


@pytest.fixture
def make_training() -> Iterator[Callable[..., Training]]:
    made: list[Training] = []

    def make(**fields: Any) -> Training:
        made.append(Training(**fields))
        return made[-1]

    yield make
    for training in made:
        if training.hooks is not None:
            training.hooks.close()


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    process = WorkerProcess()
    try:
        process.start()
        yield Served(process)
    finally:
        process.remove()
