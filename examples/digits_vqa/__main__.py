"""Train the demo: `python -m sidestep.examples.digits_vqa`."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from sidestep.examples.digits_vqa.evaluation import held_out_accuracy
from sidestep.examples.digits_vqa.failures import onset_step
from sidestep.examples.digits_vqa.settings import Failure, Settings
from sidestep.examples.digits_vqa.training import Training, attach_hooks, build, train

SUMMARY_NAME = "training.json"


def arguments() -> argparse.ArgumentParser:
    """Return the demo's options; their defaults are those of `Settings`."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m sidestep.examples.digits_vqa", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"folder that gets {SUMMARY_NAME}: losses, accuracies, weights' hash")
    parser.add_argument("--steps", type=int, default=defaults.num_steps, help="optimizer steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of weights and rows (%(default)s)")
    parser.add_argument("--fail", type=Failure, choices=list(Failure), help="train with this real mistake")
    parser.add_argument("--no-hooks", action="store_true", help="train without Sidestep")
    parser.add_argument("--accumulation", type=int, default=defaults.accumulation_steps, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="packed rows (%(default)s)")
    parser.add_argument(
        "--generation-interval", type=int, default=defaults.generation_interval_steps, help="steps (%(default)s)"
    )
    parser.add_argument(
        "--collapse-interval", type=int, default=defaults.collapse_interval_steps, help="steps (%(default)s)"
    )
    # One: so small a model gains little from two, and threads that spin for each other crawl once a core is shared.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (%(default)s)")
    parser.add_argument("--device", default=defaults.device, help="torch device (%(default)s)")
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the run that the options describe."""
    return Settings(
        num_steps=options.steps,
        seed=options.seed,
        accumulation_steps=options.accumulation,
        batch_size=options.batch_size,
        failure=options.fail,
        generation_interval_steps=options.generation_interval,
        collapse_interval_steps=options.collapse_interval,
        device=options.device,
    )


def weights_digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 of all weights: two runs with the same one are the same, bit for bit."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_summary(folder: Path, training: Training, losses: list[float], accuracy: dict[str, float]) -> None:
    """Write what the run came to as JSON; the losses are exact."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        "settings": asdict(training.settings),
        "losses": losses,
        "accuracy": accuracy,
        "weights_sha256": weights_digest(training.model),
    }
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=1, allow_nan=True) + "\n", encoding="utf-8")


def announce(training: Training) -> None:
    """Say what is about to be trained."""
    settings = training.settings
    num_parameters = sum(weight.numel() for weight in training.model.parameters())
    print(f"digits VQA: {num_parameters:,} parameters, {settings.num_steps} steps, seed {settings.seed}", flush=True)
    if settings.failure is not None:
        print(f"with a real mistake from step {onset_step(settings)} on: {settings.failure}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and say what came of it."""
    parser = arguments()
    options = parser.parse_args(argv)
    try:
        settings = settings_of(options)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    training = build(settings)
    announce(training)
    hooks = None if options.no_hooks else attach_hooks(training)
    started = time.monotonic()
    losses = train(training, hooks, show_progress=True)
    seconds = time.monotonic() - started
    accuracy = held_out_accuracy(training.model, training.tokenizer, training.held_out)
    if hooks is not None:
        hooks.log({f"held_out/{kind}": share for kind, share in accuracy.items()}, step=settings.num_steps - 1)
        hooks.close()
    print(f"trained {settings.num_steps} steps in {seconds:.0f} s, final loss {losses[-1]:.3f}")
    print("held-out accuracy: " + ", ".join(f"{kind} {share:.3f}" for kind, share in accuracy.items()))
    if options.out is not None:
        write_summary(options.out, training, losses, accuracy)


if __name__ == "__main__":
    main()
