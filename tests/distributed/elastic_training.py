"""One rank of a small training that may be ended, started again, stopped for a while, or joined by other ranks.

    torchrun ... elastic_training.py OUT [--steps N] [--alone] [--checkpoint] [--dies-when FILE] [--until FILE]
                                         [--grows]

``OUT/RANK.PID.jsonl`` has a line when the process has attached (its run, its world) and one for each step that ended,
with how long its hooks took. ``--dies-when``: the last rank takes the file away and kills itself, as a machine that
fails. ``--until``: all end once the file is there. ``--grows``: a world of one trains until it is ended. ``--alone``:
no gradients are summed, so that only the hooks could make one rank wait for another.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.support.faults_training import TinyModel, Tokenizer, batch
from tests.support.rank_processes import say_where_it_hangs
from torch.nn.parallel import DistributedDataParallel

import sidestep

ENDLESS = 1_000_000
STEP_SECONDS = 0.03


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--dies-when", type=Path)
    parser.add_argument("--grows", action="store_true")
    parser.add_argument("--until", type=Path)
    parser.add_argument("--hangs-after", type=float, default=50.0)
    return parser.parse_args()


def _load(place: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if not place.exists():
        return {}
    state: dict[str, Any] = torch.load(place, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def _save(place: Path, state: dict[str, Any]) -> None:
    fresh = place.with_suffix(".fresh")
    torch.save(state, fresh)
    fresh.replace(place)


def main() -> None:
    """Train."""
    given = options()
    say_where_it_hangs(given.hangs_after)
    torch.set_num_threads(1)
    torch.manual_seed(7)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    place = given.out / "checkpoint.pt"
    state = _load(place, model, optimizer) if given.checkpoint else {}
    trained = DistributedDataParallel(model)
    config = sidestep.HooksConfig(
        lr_interval=1, loss_breakdown_interval=1, token_stats_interval=1, gradient_log_interval=5,
        answer_length_interval=1, assembly_deadline_seconds=2.0, image_probe_interval=0,
    )  # fmt: skip
    hooks = sidestep.attach(trained, optimizer, tokenizer=Tokenizer(), config=config)
    if state:
        hooks.load_state_dict(state["hooks"])
    first = int(state.get("step", -1)) + 1
    has_died = given.dies_when is None or given.dies_when.with_suffix(".done").exists()
    last = ENDLESS if given.until or not has_died or (given.grows and world == 1) else first + given.steps
    with (given.out / f"{rank}.{os.getpid()}.jsonl").open("w", encoding="utf-8", buffering=1) as log:
        log.write(json.dumps({"world": world, "first": first, "run": hooks.run_id, "host": os.uname().nodename}) + "\n")
        for step in range(first, last):
            if given.dies_when and rank == world - 1 and given.dies_when.exists():
                given.dies_when.rename(given.dies_when.with_suffix(".done"))
                os.kill(os.getpid(), signal.SIGKILL)
            input_ids, labels = batch(step * world + rank)
            with trained.no_sync() if given.alone else nullcontext():
                _, loss = trained(input_ids, labels)
                optimizer.zero_grad()
                loss.backward()
            began = time.perf_counter()
            hooks.before_clip()
            optimizer.step()
            hooks.after_step(step)
            log.write(json.dumps({"step": step, "hooks": time.perf_counter() - began, "at": time.time()}) + "\n")
            if given.checkpoint and rank == 0:
                weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                _save(place, {**weights, "step": step, "hooks": hooks.state_dict()})
            if given.until and given.until.exists():
                break
            time.sleep(STEP_SECONDS)
        hooks.close()
        log.write(json.dumps({"failures": hooks.failures()}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
