"""Rows of docs/bad_input.md that raise at attach, or are said there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.worker_process import wait_until
from tokenizers import NormalizedString, PreTokenizedString, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer
from torch import nn

from sidestep.protocol.tables import decode_table
from sidestep.trainer_hooks.samples import Sample
from sidestep.trainer_hooks.transport import InProcessTransport

MakeTraining = Callable[..., Any]


class WrittenInPython:
    """A pre-tokenizer that no tokenizer.json can hold."""

    def split(self, _place: int, text: NormalizedString) -> list[NormalizedString]:
        return text.split(" ", "removed")

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(self.split)


def without_parameters() -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    optimizer.param_groups[0]["params"] = []
    return optimizer


@pytest.mark.parametrize(
    ("row", "arguments", "optimizer"),
    [
        ("malformed endpoint", {"endpoint": "http://host:1"}, None),
        ("endpoint without a port", {"endpoint": "tcp://127.0.0.1:*"}, None),
        ("a tokenizer that cannot decode", {"tokenizer": object()}, None),
        ("an optimizer without parameters", {}, without_parameters()),
        ("an optimizer of another model", {}, torch.optim.SGD(nn.Linear(2, 2).parameters())),
    ],
)
def test_what_raises(
    make_training: MakeTraining, told: Any, row: str, arguments: dict[str, Any], optimizer: Any
) -> None:
    training = make_training(optimizer=optimizer)
    with pytest.raises(ValueError, match=told.words(row)):
        training.attach(**arguments)
    assert not training.model._forward_hooks, "nothing was left on the model"
    told.nothing()


def test_absent_families_are_named_with_their_reasons(make_training: MakeTraining, told: Any) -> None:
    class NoHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = self.b(self.a(x)).sum()
            return total

    make_training(model=NoHead()).attach(transport=InProcessTransport, settings={"lr_interval": 0})
    told.once("absent families")
    assert told.text() == (
        "sidestep: absent from this run: tokens (neither a tokenizer nor the model's head tells how many ids there "
        "are); generation, collapse (no samples were given).\n"
    )


def test_nothing_is_said_where_all_is_exact(make_training: MakeTraining, told: Any) -> None:
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(9)}, unk_token="t0"))  # noqa: S106
    training = make_training()
    training.attach(
        transport=InProcessTransport,
        tokenizer=tokenizer,
        samples=[Sample(question="q", target="t", prompt_ids=[1])],
        generate_fn=lambda _model, asked, _limit: [[1] for _ in asked],
    )
    training.run(1)
    told.nothing()


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_tokenizer_that_cannot_be_serialised(
    make_training: MakeTraining, served: Any, told: Any, tokenizer: Any, is_slow: bool
) -> None:
    if not is_slow:
        tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(9)}, unk_token="t0"))  # noqa: S106
        tokenizer.pre_tokenizer = PreTokenizer.custom(WrittenInPython())
        with pytest.raises(Exception, match="cannot be serialized"):
            tokenizer.to_str()
    training = make_training()
    training.attach(
        endpoint=served.address,
        tokenizer=tokenizer,
        samples=[Sample(question="q", target="t", prompt_ids=[1])],
        generate_fn=lambda _model, asked, _limit: [[1, 4] for _ in asked],
    )
    told.once("a tokenizer that cannot be serialised")
    training.run(1)
    wait_until(lambda: served.rows(training.hooks), "the row")
    tables = [decode_table(content) for (content,) in served.process.query("SELECT content FROM blob")]
    kept = [each["texts"] for each in tables if isinstance(each, dict) and each.get("kind") == "texts"]
    assert {i: f"t{i}" for i in range(9)} in kept
    shown = [json.dumps(payload) for kind, payload in served.entries(training.hooks) if kind == "table"]
    assert any("t1t4" in table or "t1 t4" in table for table in shown)


def test_no_worker_can_be_started(
    make_training: MakeTraining, told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "a_file"
    home.write_text("no folder")
    monkeypatch.setenv("SIDESTEP_HOME", str(home))
    monkeypatch.setenv("SIDESTEP_RUNTIME", str(tmp_path / "r"))
    training = make_training()
    training.attach(settings={"close_timeout_seconds": 0.2})
    training.run(2)
    told.once("no worker can be started")
    assert training.hooks.failures() == {}
