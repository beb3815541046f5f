"""``sidestep demo``: the same as ``sidestep run -- python -m sidestep.examples.digits_vqa ...``, which it prints."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable

from sidestep.worker.commands.run import run_command
from sidestep.worker.config import load_config


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Train the demo; return its exit code."""
    chosen = {"--steps": options.steps, "--fail": options.fail, "--seed": options.seed, "--out": options.out}
    arguments = [text for name, value in chosen.items() if value is not None for text in (name, str(value))]
    module = ["-m", "sidestep.examples.digits_vqa", *arguments]
    out = [] if options.out is None else ["--out", str(options.out)]
    say(f"$ {shlex.join(['sidestep', 'run', *out, '--', 'python', *module])}")
    return run_command([sys.executable, *module], load_config({"out": options.out}), say)
