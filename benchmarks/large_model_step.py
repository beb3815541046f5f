"""What an optimizer step of a model of nanoVLM-460M's shape costs: without hooks, with Sidestep, with metrics inline.

    python benchmarks/large_model_step.py [--quick] [--layers N] [--json FILE]

On a CUDA device: 460,113,984 parameters in nanoVLM's 440 tensors (``large_model.py``), float32 with bfloat16 autocast,
AdamW, two rows of 1,024 positions a micro-batch, made up and packed as nanoVLM packs. The loop itself reads nothing
from the device. The modes are those of ``step_overhead.py``, with the defaults of ``HooksConfig``: five processes on
one device take turns of five steps. The device is waited for at the end of a turn only, so that what a mode launches
may run behind the next step's launches, as it does in training; the unit of wall time is a turn, divided by its steps.

``--layers N`` scales everything down for a CPU: N blocks of a small width. That shows that it runs, and no more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where this is run from does not matter

from benchmarks.inline_logger import InlineLogger
from benchmarks.large_model import LargeModel, Shape, scaled_down
from benchmarks.nanovlm_rows import Rows, WordTokenizer
from benchmarks.step_overhead import SHARED_MODES as MODES
from benchmarks.step_overhead import WARMUP_STEPS, NoHooks
from benchmarks.turns import (
    CLOCKS,
    TURN_STEPS,
    Step,
    TimedCalls,
    Turns,
    hook_milliseconds,
    machine,
    spread,
    take_turns,
    worker_beside,
)

import sidestep
from sidestep.trainer_hooks.integrations import nanovlm

NUM_STEPS, NUM_QUICK_STEPS = 210, 60
NUM_BATCHES = 8
RATES = {"MP": 5e-5, "vision_encoder": 1e-5, "decoder": 1e-5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all modes have in common."""

    shape: Shape
    """Of the model."""
    device: str
    """``cuda`` or ``cpu``."""
    num_rows: int
    """Rows of a micro-batch."""
    positions: int
    """Positions of a row."""
    asked_words: tuple[int, int]
    """Words of a question, from and below."""
    said_words: tuple[int, int]
    """Words of an answer, from and below."""
    accumulation: int
    """Micro-batches of an optimizer step."""
    num_steps: int
    """Optimizer steps, the first ones, which are not counted, included."""


def setting_of(*, layers: int | None, num_rows: int, accumulation: int, num_steps: int) -> Setting:
    """Return the full setting, for a CUDA device, or one of ``layers`` small blocks, for any."""
    full = Setting(
        shape=Shape(), device="cuda" if torch.cuda.is_available() else "cpu", num_rows=num_rows, positions=1_024,
        asked_words=(100, 200), said_words=(40, 80), accumulation=accumulation, num_steps=num_steps,
    )  # fmt: skip
    if layers is None:
        return full
    return replace(full, shape=scaled_down(layers), positions=256, asked_words=(10, 20), said_words=(4, 8))


def train(mode: str, setting: Setting, pipe: Any) -> None:
    """Train in ``mode``, turn by turn; runs in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(setting.device)
    tokenizer = WordTokenizer(setting.shape.vocabulary)
    model = LargeModel(setting.shape, image_token_id=tokenizer.image_token_id).to(device)
    optimizer = torch.optim.AdamW(
        [{"params": list(getattr(model, name).parameters()), "lr": rate} for name, rate in RATES.items()],
        fused=device.type == "cuda",
    )
    rows = Rows(
        tokenizer, length=setting.positions, tile_pixels=setting.shape.tile_pixels,
        vocabulary_size=tokenizer.image_token_id, image_tokens=setting.shape.image_tokens(),
        asked_words=setting.asked_words, said_words=setting.said_words,
    )  # fmt: skip
    hooks = hooks_of(mode, model, optimizer, tokenizer, rows)
    timed: Any = TimedCalls(hooks)
    batches = [on_the_way(rows.batch(setting.num_rows), device) for _ in range(NUM_BATCHES)]
    pipe.send("ready")
    losses = loop(model, optimizer, batches, hooks=timed, turns=Turns(pipe, timed), setting=setting)
    hooks.close()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    failures = hooks.failures() if isinstance(hooks, sidestep.Hooks) else {}
    pipe.send({"losses": losses, "peak_bytes": peak, "failures": failures})


def on_the_way(batch: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """Pin a batch for a CUDA device, as nanoVLM's loaders do: from other memory a copy would wait for the device."""
    if device.type != "cuda":
        return batch
    images = [[tile.pin_memory() for tile in row] for row in batch["images"]]
    return {**{name: batch[name].pin_memory() for name in batch if name != "images"}, "images": images}


def hooks_of(mode: str, model: LargeModel, optimizer: Any, tokenizer: WordTokenizer, rows: Rows) -> Any:
    """Make what is called in the loop."""
    config = sidestep.HooksConfig()
    if mode == "none":
        return NoHooks()
    generates = not mode.endswith("without_generation")
    samples = nanovlm.validation_samples(rows.validation(), tokenizer, count=config.generation_samples)
    if mode.startswith("inline"):
        prompts = [
            SimpleNamespace(question=p.question, answer=p.target, ids=p.prompt(), tiles=p.inputs["images"])
            for p in samples
        ]
        return InlineLogger(model, optimizer, tokenizer, prompts if generates else (), config)
    if not generates:
        config = replace(config, generation_eval_interval=0, collapse_detection_interval=0)
    return sidestep.attach(
        model, optimizer, tokenizer=tokenizer, samples=samples, config=config, project="benchmark", name=mode,
        modules=nanovlm.MODULES,
    )  # fmt: skip


def loop(
    model: LargeModel,
    optimizer: Any,
    batches: Sequence[Mapping[str, Any]],
    *,
    hooks: Any,
    turns: Turns,
    setting: Setting,
) -> list[float]:
    """Train in the order of nanoVLM's train.py; the batches stay on the host, and the losses are read at the end."""
    model.train()
    losses: list[torch.Tensor] = []
    for step in range(setting.num_steps + 1):
        for micro in range(setting.accumulation):
            batch = batches[(step * setting.accumulation + micro) % len(batches)]
            on_device = {
                name: batch[name].to(setting.device, non_blocking=True)
                for name in ("input_ids", "attention_mask", "labels")
            }
            with torch.autocast(setting.device, dtype=torch.bfloat16):
                logits, loss = model(
                    on_device["input_ids"], batch["images"], on_device["attention_mask"], on_device["labels"]
                )
            hooks.on_batch(
                input_ids=batch["input_ids"], labels=batch["labels"], attention_mask=batch["attention_mask"],
                logits=logits.detach(), loss=loss.detach(), shifted=True,
            )  # fmt: skip
            losses.append(loss.detach())
            (loss / setting.accumulation).backward()
            del logits, loss
        hooks.before_clip()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hooks.after_step(step)
        if step < setting.num_steps:
            if setting.device == "cuda" and (step + 1) % TURN_STEPS == 0:
                torch.cuda.synchronize()
            turns.end_step(step)
    return [loss.item() for loss in losses]


def figures_of(steps: Sequence[Step]) -> dict[str, Any]:
    """Return a mode's milliseconds a step: means, and medians over the turns that are counted."""
    counted = [step for step in steps if step["step"] >= WARMUP_STEPS]
    turns = [counted[place : place + TURN_STEPS] for place in range(0, len(counted), TURN_STEPS)]
    found: dict[str, Any] = {"steps": len(counted)}
    for clock in CLOCKS:
        found[clock] = spread([1e3 * sum(step[clock] for step in turn) / len(turn) for turn in turns])
    for place, clock in ((1, "cpu"), (2, "wall")):
        found[f"in_calls_{clock}_mean"] = 1e3 * sum(call[place] for s in counted for call in s["calls"]) / len(counted)
    return found


def measure(setting: Setting) -> dict[str, Any]:
    """Run all modes and return the figures."""
    with tempfile.TemporaryDirectory(prefix="ss-large-") as folder, worker_beside(Path(folder)):
        steps, said = take_turns(MODES, train, (setting,), setting.num_steps)
        time.sleep(1.0)  # the worker stores what the goodbyes have just brought
        counted = hook_milliseconds(Path(folder) / "out" / "journal", first=WARMUP_STEPS)
    modes = {mode: figures_of(steps[mode]) for mode in MODES}
    none = modes["none"]
    for mode, row in modes.items():
        row["times_none"] = {
            f"{clock}_{which}": row[clock][which] / none[clock][which]
            for clock in CLOCKS for which in ("median", "mean")
        }  # fmt: skip
        row["share_of_step"] = (row["in_calls_cpu_mean"] - none["in_calls_cpu_mean"]) / none["wall"]["mean"]
        row["peak_device_gib"] = said[mode]["peak_bytes"] / (1 << 30)
        if mode in counted:
            row["hooks_own_count"] = spread(counted[mode])
    return {
        "modes": modes,
        "losses_identical_in_all_modes": all(each["losses"] == said["none"]["losses"] for each in said.values()),
        "losses_differ_by_at_most": max(
            abs(loss - plain) / abs(plain)
            for each in said.values()
            for loss, plain in zip(each["losses"], said["none"]["losses"], strict=True)
        ),
        "failures": {mode: each["failures"] for mode, each in said.items() if each["failures"]},
    }


def parameter_table(shape: Shape) -> dict[str, int]:
    """Return how many tensors and parameters a model of the shape has."""
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in LargeModel(shape, image_token_id=0).parameters()]
    return {"tensors": len(sizes), "parameters": sum(sizes)}


def table(result: Mapping[str, Any]) -> str:
    """Return the figures for people."""
    lines = [
        "| mode | wall, median (mean) ms | times none, median (mean) | thread CPU, mean ms | in calls, CPU (wall) ms |",
        "| --- |" + " ---: |" * 4,
    ]
    for mode, row in result["modes"].items():
        wall, times = row["wall"], row["times_none"]
        lines.append(
            f"| {mode} | {wall['median']:.1f} ({wall['mean']:.1f}) "
            f"| {times['wall_median']:.4f} ({times['wall_mean']:.4f}) | {row['thread_cpu']['mean']:.1f} "
            f"| {row['in_calls_cpu_mean']:.3f} ({row['in_calls_wall_mean']:.3f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="N small blocks instead of nanoVLM-460M's; on a CPU too"
    )
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch (%(default)s, nanoVLM's own)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step (%(default)s)")
    options = parser.parse_args()
    if options.layers is None and not torch.cuda.is_available():
        parser.error("no CUDA device: a CPU takes many seconds for such a step; --layers 2 scales it down")
    setting = setting_of(
        layers=options.layers,
        num_rows=options.rows,
        accumulation=options.accumulation,
        num_steps=NUM_QUICK_STEPS if options.quick else NUM_STEPS,
    )
    on = machine()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **on,
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "",
        "torch": version("torch"),
        "setting": asdict(setting),
        **parameter_table(setting.shape),
        **measure(setting),
    }
    print(f"{result['tensors']} tensors, {result['parameters']:,} parameters; {result['device'] or 'no CUDA device'}")
    print(table(result))
    print(f"\nlosses identical in all modes: {result['losses_identical_in_all_modes']}")
    print(f"failures of the hooks: {result['failures'] or 'none'}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
