"""One rank of trainings with generation, one after another: ``torchrun generating_training.py OUT CASE...``.

Cases: a wrapper of ``sharded_training.py`` (``fsdp2``, ``tp``; ``ddp``: split over ranks); with ``-off`` nobody asks
for it; with ``-raises`` the forward of the last rank raises in the second generation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.sharded_training import EOS, VOCABULARY, WRAPPERS, Model, Tokenizer, make_batch, whole
from tests.support.rank_processes import say_where_it_hangs
from torch import nn

from sidestep.protocol.messages import Generation
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.hooks import attach
from sidestep.trainer_hooks.samples import Sample
from sidestep.trainer_hooks.transport import InProcessTransport

PROMPTS = ([5], [6, 7], [8, 9, 10], [3, 11])
NUM_STEPS, MAX_NEW_TOKENS = 3, 6


class Generating(Model):
    """Gives logits without targets as well; on request its forward raises in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards_to_go = -1
        with torch.no_grad():
            self.head.bias[EOS] += 0.9  # some answers end early: the others must not wait for them

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: Any = None) -> Any:
        if not self.training and self.forwards_to_go >= 0:
            self.forwards_to_go -= 1
            if self.forwards_to_go < 0:
                raise ValueError("a broken forward")
        # The past counts, so that an answer is one and not a walk from id to id.
        hidden = (self.embedding(input_ids) * attention_mask[..., None]).cumsum(dim=1)
        logits = self.head(self.block(hidden))
        if targets is None:
            return logits, None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def expected(model: nn.Module) -> list[list[int]]:
    """Each prompt alone through a plain copy of the model as it is now, up to and with its first EOS."""
    plain = Generating()
    state = {name.removeprefix("module."): whole(tensor) for name, tensor in model.state_dict().items()}
    plain.load_state_dict(state)
    plain.eval()
    rows = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(MAX_NEW_TOKENS):
            with torch.no_grad():
                logits, _ = plain(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        rows.append(ids[len(prompt) :])
    return rows


def train(case: str) -> dict[str, Any]:
    name, _, manner = case.partition("-")
    torch.manual_seed(3)
    inner = Generating()
    wrapped = WRAPPERS[name](inner)
    optimizer = torch.optim.SGD(wrapped.model.parameters(), lr=0.05)
    opened: list[InProcessTransport] = []

    def way(*given: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*given))
        return opened[-1]

    config = HooksConfig(
        generation_eval_interval=1,
        collapse_detection_interval=0,
        max_new_tokens=MAX_NEW_TOKENS,
        generate_when_sharded=manner != "off",
        split_generation=name == "ddp",
    )
    samples = [Sample(question="q", target="t", prompt_ids=prompt) for prompt in PROMPTS]
    hooks = attach(wrapped.model, optimizer, tokenizer=Tokenizer(), samples=samples, config=config, transport=way)
    rows, wanted = torch.Generator().manual_seed(wrapped.data_rank), []
    for step in range(NUM_STEPS):
        _, loss = wrapped.model(**make_batch(rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(expected(wrapped.model))
        if manner == "raises" and step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            inner.forwards_to_go = 2
        hooks.after_step(step)
        if manner == "raises":
            (_OUT / f"{case}.{dist.get_rank()}.step").write_text(str(step), encoding="utf-8")
    hooks.close()
    [transport] = opened
    made = [message for message in transport.messages if isinstance(message, Generation)]
    return {
        "wanted": wanted,
        "made": [
            {int(row): m.ids[m.offsets[i] : m.offsets[i + 1]].tolist() for i, row in enumerate(m.samples)} for m in made
        ],
        "failed": [text for message in made for text in message.failures],
        "failures": hooks.failures(),
        "support": dict(transport.hello.capabilities),
        "is_sharded_again": all(hasattr(p, "placements") for p in inner.parameters()),
    }


_OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def main(cases: list[str]) -> None:
    assert len(Tokenizer()) == VOCABULARY
    say_where_it_hangs(150)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases:
        told = train(case)
        (_OUT / f"{case}.{dist.get_rank()}.json").write_text(json.dumps(told), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2:])
