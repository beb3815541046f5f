"""One rank of a DDP training with hooks, for test_hooks_ranks.py: ``ddp_trainer.py RANK PORT OUT HOOKED``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.support.rank_processes import say_where_it_hangs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.hooks import attach
from sidestep.trainer_hooks.transport import InProcessTransport


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.lm_head = nn.Linear(8, 13)

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> Any:
        logits = self.lm_head(self.embedding(input_ids))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def main(rank: int, port: str, out: Path, *, hooked: bool) -> None:
    say_where_it_hangs(30)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    opened: list[InProcessTransport] = []

    def way(*given: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*given))
        return opened[-1]

    config = HooksConfig(gradient_log_interval=1, token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1)
    hooks = attach(model, optimizer, config=config, transport=way) if hooked else None
    rows = torch.Generator().manual_seed(rank)
    losses = []
    for step in range(3):
        ids = torch.randint(0, 13, (2, 6), generator=rows)
        _, loss = model(ids, targets=ids.roll(-1, dims=1))
        loss.backward()
        if hooks is not None:
            hooks.before_clip()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if hooks is not None:
            hooks.after_step(step)
    found: dict[str, Any] = {"losses": losses, "weights": [p.flatten().tolist() for p in model.parameters()]}
    if hooks is not None:
        hooks.close()
        [transport] = opened
        found |= {
            "run_id": transport.identity.run_id,
            "incarnation": transport.identity.incarnation,
            "rank": transport.identity.rank,
            "kinds": [message.kind.name for message in transport.messages],
            "topology": dict(transport.hello.topology),
            "failures": hooks.failures(),
        }
    out.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()  # a rank that leaves first can keep the other waiting in its last operation
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), hooked=sys.argv[4] == "hooked")
