"""What an optimizer step of nanoVLM costs: without logging, with its own, with metrics taken inline, with Sidestep.

    python benchmarks/nanovlm_step.py --nanovlm CHECKOUT [--quick] [--json FILE]

CHECKOUT (or SIDESTEP_NANOVLM) holds nanoVLM; this Python has what it needs, and Sidestep. Its own model class and its
own configurations are used, everything small, in a loop of the shape of its train.py; pictures, conversations and the
tokenizer are made up, and nothing is fetched. The modes:

    none                       no logging, no host read
    own                        its two host reads a micro-step, its statistics, its run.log (W&B offline)
    inline                     own, and the metrics of docs/metrics.md on the spot (inline_logger.py)
    sidestep                   the lines of docs/nanovlm.md; its own keys go through them
    *_without_generation       the same two, without generation

Every mode trains in a process of its own; they take turns of a few steps. A real worker runs beside them on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where this is run from does not matter

from benchmarks.inline_logger import InlineLogger
from benchmarks.nanovlm_logging import InlineLogging, NoLogging, OwnLogging, SidestepLogging
from benchmarks.nanovlm_rows import IMAGE_TOKENS_PER_TILE, Rows, write_tokenizer
from benchmarks.turns import (
    CLOCKS,
    TimedCalls,
    Turns,
    hook_milliseconds,
    machine,
    milliseconds,
    spread,
    take_turns,
    worker_beside,
)

from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.integrations import nanovlm

MODES = ("none", "own", "inline", "inline_without_generation", "sidestep", "sidestep_without_generation")
WARMUP_STEPS = 10
NUM_STEPS, NUM_QUICK_STEPS = 210, 60
NUM_BATCHES = 40
SETTLE_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all modes have in common."""

    checkout: Path
    """nanoVLM's folder."""
    tokenizer: Path
    """The made-up tokenizer's."""
    num_steps: int
    """Optimizer steps, warm-up included."""
    accumulation: int
    """Micro-batches a step."""
    threads: int
    """CPU threads of torch."""


@contextlib.contextmanager
def quiet() -> Any:
    """Keep stdout for the figures: nanoVLM prints while it is made."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def build(setting: Setting) -> tuple[Any, Any, Any, torch.optim.Optimizer]:
    """Make nanoVLM's configurations, its model and its optimizer."""
    sys.path.insert(0, str(setting.checkout))
    config = importlib.import_module("models.config")
    made = importlib.import_module("models.vision_language_model")
    extra = config.VLMConfig().vlm_extra_tokens
    base = len(json.loads((setting.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    vlm_cfg = config.VLMConfig(
        vit_hidden_dim=64, vit_inter_dim=256, vit_patch_size=8, vit_img_size=32, vit_n_heads=2, vit_n_blocks=2,
        lm_hidden_dim=96, lm_inter_dim=256, lm_max_position_embeddings=512, lm_base_vocab_size=base,
        extra_token_amount=len(extra), lm_vocab_size=base + len(extra), lm_n_heads=6, lm_n_kv_heads=2, lm_n_blocks=3,
        lm_max_length=256, lm_tokenizer=str(setting.tokenizer), mp_pixel_shuffle_factor=2,
        mp_image_token_length=IMAGE_TOKENS_PER_TILE, vlm_load_backbone_weights=False,
    )  # fmt: skip
    train_cfg = config.TrainConfig(
        gradient_accumulation_steps=setting.accumulation, max_training_steps=setting.num_steps, max_sample_length=256
    )
    torch.manual_seed(0)
    with quiet():
        model = made.VisionLanguageModel(vlm_cfg, load_backbone=False)
    groups = [
        {"params": list(model.MP.parameters()), "lr": train_cfg.lr_mp},
        {"params": list(model.vision_encoder.parameters()), "lr": train_cfg.lr_vision_backbone},
        {"params": list(model.decoder.parameters()), "lr": train_cfg.lr_language_backbone},
    ]
    return vlm_cfg, train_cfg, model, torch.optim.AdamW(groups)


def logging_of(mode: str, setting: Setting, rows: Rows, parts: tuple[Any, Any, Any, Any], folder: str) -> NoLogging:
    """Make what a mode logs with."""
    vlm_cfg, train_cfg, model, optimizer = parts
    often: dict[str, int] = {"accumulation": setting.accumulation, "every_steps": train_cfg.stats_log_interval}
    if mode == "none":
        return NoLogging()
    if mode == "own":
        wandb = importlib.import_module("wandb")
        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off"))
        return OwnLogging(run, **often)
    generates = not mode.endswith("without_generation")
    if mode.startswith("inline"):
        config = HooksConfig.from_train_config(train_cfg)
        prompts = nanovlm.validation_samples(rows.validation(), model.tokenizer, count=config.generation_samples)
        asked = [
            SimpleNamespace(question=p.question, answer=p.target, ids=p.prompt(), tiles=p.inputs["images"])
            for p in prompts
        ]
        logger = InlineLogger(model, optimizer, model.tokenizer, asked if generates else (), config)
        return InlineLogging(logger, **often)
    off: dict[str, Any] = {} if generates else {"generation_eval_interval": 0, "collapse_detection_interval": 0}
    hooks = nanovlm.attach(model, optimizer, rows.validation(), vlm_cfg, train_cfg, name=mode, **off)
    return SidestepLogging(hooks, **often)


def train(mode: str, setting: Setting, pipe: Any) -> None:
    """Train in ``mode``, turn by turn; runs in a process of its own."""
    torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory(prefix="nanovlm-step-") as folder:
        os.chdir(folder)
        parts = build(setting)
        model, optimizer = parts[2:]
        rows = Rows(model.tokenizer, length=parts[0].lm_max_length, tile_pixels=parts[0].vit_img_size)
        logging = logging_of(mode, setting, rows, parts, folder)
        timed: Any = TimedCalls(logging)
        batches = [rows.batch(parts[1].batch_size) for _ in range(NUM_BATCHES)]
        pipe.send("ready")
        turns = Turns(pipe, timed, settle_seconds=SETTLE_SECONDS)
        losses = loop(model, optimizer, batches, logging=timed, turns=turns, setting=setting)
        logging.close()
        pipe.send({"losses": losses, "failures": logging.failures()})


def loop(
    model: Any, optimizer: Any, batches: list[Any], *, logging: Any, turns: Turns, setting: Setting
) -> list[float]:
    """Train in the order of nanoVLM's train.py; the losses are read at the end."""
    model.train()
    losses: list[torch.Tensor] = []
    optimizer.zero_grad()
    waited_since = time.perf_counter()
    for i in range((setting.num_steps + 1) * setting.accumulation):
        batch = batches[i % len(batches)]
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, loss = model(
                batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
            )
        losses.append(loss.detach())
        logging.after_forward(batch, logits, loss)
        loss = loss / setting.accumulation
        loss.backward()
        computed = time.perf_counter() - began
        is_update_step = (i + 1) % setting.accumulation == 0
        norm = None
        if is_update_step:
            logging.before_clip()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        logging.after_microbatch(batch, loss, (began - waited_since, computed, began))
        if is_update_step:
            step = i // setting.accumulation
            logging.after_step(step, norm)
            if step < setting.num_steps:
                turns.end_step(step)
        waited_since = time.perf_counter()
    return [loss.item() for loss in losses]


def measure(setting: Setting, *, core: int | None) -> dict[str, Any]:
    """Run all modes and return the figures."""
    with tempfile.TemporaryDirectory(prefix="nanovlm-worker-") as folder, worker_beside(Path(folder), core=core):
        steps, said = take_turns(MODES, train, (setting,), setting.num_steps)
        time.sleep(1.0)  # the worker stores what the goodbyes have just brought
        counted = hook_milliseconds(Path(folder) / "out" / "journal", first=WARMUP_STEPS)
    modes: dict[str, Any] = {}
    for mode in MODES:
        modes[mode] = milliseconds(steps[mode], first=WARMUP_STEPS)
        calls = [sum(cpu for _, cpu, _ in s["calls"]) for s in steps[mode] if s["step"] >= WARMUP_STEPS]
        modes[mode]["in_calls_cpu_mean"] = 1e3 * sum(calls) / len(calls)
        if mode in counted:
            modes[mode]["hooks_own_count"] = spread(counted[mode])
    ratios = {
        mode: {f"{clock}_{which}": modes[mode][clock][which] / modes["none"][clock][which]
               for clock in CLOCKS for which in ("median", "mean", "p99")}
        for mode in MODES
    }  # fmt: skip
    return {
        "modes": modes,
        "times_none": ratios,
        "losses_identical_in_all_modes": all(each["losses"] == said["none"]["losses"] for each in said.values()),
        "failures": {mode: each["failures"] for mode, each in said.items() if each["failures"]},
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures for people."""
    lines = [
        "| ms a step: median / mean / p99 | thread CPU | process CPU | wall | means, of none | in logging calls, CPU |",
        "| --- |" + " ---: |" * 5,
    ]
    clocks = ("thread_cpu", "process_cpu", "wall")
    for mode, row in result["modes"].items():
        cells = [" / ".join(f"{row[clock][which]:.1f}" for which in ("median", "mean", "p99")) for clock in clocks]
        cells.append(" / ".join(f"{result['times_none'][mode][f'{clock}_mean']:.3f}" for clock in clocks))
        lines.append(f"| {mode} | {' | '.join(cells)} | {row['in_calls_cpu_mean']:.2f} |")
    for mode, row in result["modes"].items():
        if own := row.get("hooks_own_count"):
            lines.append(
                f"\n{mode}, wall by the hooks' own count, generation left out, hooks on model and optimizer included: "
                f"median {own['median']:.2f}, mean {own['mean']:.2f}, p99 {own['p99']:.2f} ms a step"
            )
    return "\n".join(lines)


def commit_of(checkout: Path) -> str:
    """The checkout's commit, or nothing where there is none."""
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanovlm", type=Path, default=os.environ.get("SIDESTEP_NANOVLM"), metavar="CHECKOUT")
    parser.add_argument("--quick", action="store_true", help="fewer steps, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch in each mode (%(default)s)")
    parser.add_argument("--unpinned", action="store_true", help="do not bind the worker to the last core")
    options = parser.parse_args()
    if options.nanovlm is None:
        parser.error("name a checkout of nanoVLM: --nanovlm CHECKOUT, or SIDESTEP_NANOVLM")
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    cores = sorted(os.sched_getaffinity(0))
    core = None if options.unpinned or len(cores) < 2 else cores[-1]
    before = machine()
    with tempfile.TemporaryDirectory(prefix="nanovlm-tokenizer-") as folder:
        write_tokenizer(Path(folder))
        setting = Setting(
            checkout=options.nanovlm.resolve(),
            tokenizer=Path(folder),
            num_steps=NUM_QUICK_STEPS if options.quick else NUM_STEPS,
            accumulation=options.accumulation,
            threads=options.threads,
        )
        measured = measure(setting, core=core)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **before,
        "nanovlm": commit_of(setting.checkout),
        "versions": {name: version(name) for name in ("torch", "transformers", "wandb", "sidestep")},
        "steps_per_mode": setting.num_steps - WARMUP_STEPS,
        "accumulation": setting.accumulation,
        "threads": setting.threads,
        **measured,
    }
    print(table(result))
    print(
        f"\nlosses identical in all modes: {result['losses_identical_in_all_modes']}; "
        f"failures of the hooks: {result['failures'] or 'none'}\n"
        f"{result['steps_per_mode']} steps a mode; {before['processor']}, {before['hardware']}, load before "
        f"{before['load_before']:.1f}; Python {before['python']}, {result['versions']}, nanoVLM {result['nanovlm']}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
