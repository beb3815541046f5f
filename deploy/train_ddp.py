"""The demo's model on many ranks, as the how-tos of this folder start it: ``torchrun ... train_ddp.py [--steps N]``.

DistributedDataParallel over gloo, or over NCCL where there are GPUs; each rank draws rows of its own. Sidestep is the
few lines that it is in any training: ``attach()``, ``after_step()``, ``close()``. The worker's address and its keys
come from the environment (``SIDESTEP_ENDPOINT``, ``SIDESTEP_KEYS``).
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

import sidestep
from sidestep.examples.digits_vqa.settings import Settings
from sidestep.examples.digits_vqa.training import build, generation_samples, hooks_config


def main() -> None:
    """Train, and say so on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (%(default)s)")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device != "cpu" else "gloo")
    # The seed is the rank's own, for its rows; the weights are rank 0's: DistributedDataParallel sends them to all.
    training = build(Settings(num_steps=options.steps, seed=rank, device=device))
    model: torch.nn.Module = DistributedDataParallel(training.model)
    optimizer = training.optimizer
    hooks = sidestep.attach(
        model,
        optimizer,
        tokenizer=training.tokenizer,
        samples=generation_samples(training),
        config=hooks_config(training.settings),
        project="sidestep-demo",
        name=f"digits-ddp-{torch.distributed.get_world_size()}",
    )
    model.train()
    for step, batch in zip(range(options.steps), training.loader, strict=False):
        _, loss = model(
            batch["input_ids"].to(device),
            batch["images"],
            attention_mask=batch["attention_mask"].to(device),
            targets=batch["labels"].to(device),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hooks.after_step(step)
    hooks.close()
    if rank == 0:
        print(f"trained {options.steps} steps on {torch.distributed.get_world_size()} ranks, loss {loss.item():.3f}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
