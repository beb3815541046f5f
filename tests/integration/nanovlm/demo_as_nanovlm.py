"""Trains the demo's model as nanoVLM's train.py trains its own: ``demo_as_nanovlm.py OUT [--unpatched]``.

Its names, its order, its processes: every evaluation starts a DataLoader's worker, which is forked while the hooks'
sockets and threads live. With RANK in the environment it is one rank of a gloo group under DDP.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.support.rank_processes import say_where_it_hangs
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sidestep.examples.digits_vqa.packing import collate
from sidestep.examples.digits_vqa.settings import Settings
from sidestep.examples.digits_vqa.training import build
from sidestep.trainer_hooks.integrations import nanovlm as sidestep

NUM_STEPS, ACCUMULATION = 4, 2


class NoHooks:
    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--unpatched", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    training = build(Settings(batch_size=2, seed=rank))
    optimizer, model = training.optimizer, training.model
    val_loader = DataLoader(
        training.loader.dataset, 2, collate_fn=collate, num_workers=1, multiprocessing_context="fork",
        generator=torch.Generator(),
    )  # fmt: skip
    wrapped: Any = model
    if "RANK" in os.environ:
        say_where_it_hangs(70)
        distributed.init_process_group("gloo")
        wrapped = DistributedDataParallel(model)
    train_cfg = SimpleNamespace(
        gradient_accumulation_steps=ACCUMULATION, generation_eval_interval=ACCUMULATION * 3,
        collapse_detection_interval=0, gradient_log_interval=ACCUMULATION, log_wandb=True, wandb_entity="an-entity",
    )  # fmt: skip
    hooks: Any = NoHooks()
    if not options.unpatched:
        hooks = sidestep.attach(
            wrapped, optimizer, val_loader, {"lm_hidden_dim": 96}, train_cfg, name="tiny", tokenizer=training.tokenizer,
            token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1, answer_length_interval=1,
            generation_samples=4, max_new_tokens=6,
        )  # fmt: skip
    batches = iter(training.loader)
    arrays: dict[str, Any] = {}
    losses: list[float] = []
    for global_step in range(NUM_STEPS):
        wrapped.train()
        for microstep in range(ACCUMULATION):
            batch = next(batches)
            place = f"batch/{global_step}/{microstep}"
            logits, loss = forward(wrapped, batch)
            hooks.on_batch(batch, 1)
            arrays |= recorded(place, batch, logits, loss)
            losses.append(loss.item())
            loss = loss / ACCUMULATION
            loss.backward()  # type: ignore[no-untyped-call]
        hooks.before_clip()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                arrays[f"gradient/{global_step}/{name}"] = parameter.grad.numpy().copy()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wrapped.eval()
        with torch.no_grad():
            for batch in val_loader:
                logits, loss = forward(wrapped, batch)
                break
        if rank == 0:
            hooks.log({"val_loss": loss.item()}, step=global_step)
            hooks.log({"batch_loss": losses[-1], "grad_norm": grad_norm}, step=global_step)
        hooks.after_step(global_step)
    hooks.finish()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    facts = np.array([len(training.tokenizer), training.tokenizer.eos_token_id, training.tokenizer.image_token_id])
    np.savez(options.out / f"rank{rank}.npz", losses=np.array(losses), weights=weights, vocabulary=facts, **arrays)
    if "RANK" in os.environ:
        distributed.destroy_process_group()


def forward(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(
            batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
        )
    return logits, loss


def recorded(place: str, batch: Any, logits: torch.Tensor, loss: torch.Tensor) -> dict[str, NDArray[Any]]:
    return {
        f"{place}/input_ids": batch["input_ids"].numpy().copy(),
        f"{place}/labels": batch["labels"].numpy().copy(),
        f"{place}/mask": batch["attention_mask"].numpy().copy(),
        f"{place}/logits": logits.detach().float().numpy().copy(),
        f"{place}/loss": loss.detach().float().numpy().copy(),
    }


if __name__ == "__main__":
    main()
