"""The command line: ``sidestep demo | run | worker | keys | status | replay | report``; commands/ does the work."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final, NoReturn

from sidestep import __version__
from sidestep.protocol.errors import EndpointError
from sidestep.worker.config import WorkerConfig, environment_name, flag_name
from sidestep.worker.errors import ConfigError, WorkerError

EXIT_USAGE: Final = 2
EXIT_FAILED: Final = 1
_COMMANDS: Final = {
    "demo": "train the demo with a worker beside it, and write its report",
    "run": "run a training command with a worker beside it, and write its report",
    "worker": "serve trainers until told to end",
    "keys": "make the key files for a worker that other hosts reach",
    "status": "ask a worker how it is; exit code 0 only when it is healthy",
    "replay": "rebuild runs from their journal alone, and compare with what was recorded",
    "report": "write a run's report as one HTML file",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code: 0, the trained command's own, 1 failed, 2 used wrongly."""
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: Sequence[str]) -> int:
    """Run one command line; return its exit code."""
    given, command = _split(argv)
    parser = build_parser()
    options = parser.parse_args(given)
    if options.command == "run":
        if not command:
            parser.error("run: name the command to run after --, as in `sidestep run -- python train.py`")
        options.trained_command = command
    elif command:
        parser.error(f"{options.command}: takes nothing after --")
    module = importlib.import_module(f"sidestep.worker.commands.{options.command}")
    try:
        return int(module.execute(options, say))
    except (ConfigError, EndpointError) as error:
        complain(str(error))
        return EXIT_USAGE
    except (WorkerError, OSError) as error:
        complain(str(error))
        return EXIT_FAILED


def say(text: str) -> None:
    """Print a line for people; where nobody reads any more, what was asked for is done all the same."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  (a device, not a path of ours)
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def complain(text: str) -> None:
    """Print what is wrong."""
    print(f"sidestep: {text}", file=sys.stderr, flush=True)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return list(argv), []
    at = list(argv).index("--")
    return list(argv[:at]), list(argv[at + 1 :])


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="sidestep", description="Sidecar metrics that never step into the training loop."
    )
    parser.add_argument("--version", action="version", version=f"sidestep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {
        name: commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for name, text in _COMMANDS.items()
    }
    demo = made["demo"]
    demo.add_argument(
        "--out", type=Path, metavar="DIR", help="where run, journal and report go (default: a new folder)"
    )
    demo.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    demo.add_argument("--fail", metavar="KIND", help="train with a real mistake: labels-to-A or learning-rate")
    demo.add_argument("--seed", type=int, metavar="S", help="seed of weights and rows")
    made["run"].usage = "sidestep run [worker options] -- COMMAND ..."
    for name in ("run", "worker"):
        _add_worker_options(made[name])
    made["keys"].add_argument("folder", type=Path, metavar="DIR", help="where they go; none is ever replaced")
    made["status"].add_argument("journal", nargs="?", type=Path, metavar="JOURNAL", help="default: the latest run's")
    made["status"].add_argument("--json", action="store_true", help="print all figures as JSON")
    made["replay"].add_argument("journal", nargs="?", type=Path, metavar="JOURNAL", help="default: the latest run's")
    made["replay"].add_argument(
        "--out", type=Path, metavar="DIR", help="where the rebuilt runs go (default: a new folder)"
    )
    made["replay"].add_argument(
        "--recompute",
        action="store_true",
        help="decide anew from the raw messages, and make a new run of each; the recorded ones are only read",
    )
    made["replay"].add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="NAME=VALUE",
        help="with --recompute: judge by another value of a setting, such as collapse_verdict=literal; may be repeated",
    )
    made["report"].add_argument("journal", nargs="?", type=Path, metavar="JOURNAL", help="default: the latest run's")
    made["report"].add_argument("--out", type=Path, metavar="FILE", help="default: report.html beside the journal")
    made["report"].add_argument("--run", metavar="RUN_ID", help="default: the journal's newest run")
    return parser


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with these options (SIDESTEP_CONFIG)")
    for option in fields(WorkerConfig):
        told = f"{option.metadata['help']} ({environment_name(option.name)})".replace("%", "%%")
        if option.type == "bool":
            parser.add_argument(flag_name(option.name), action="store_const", const=True, help=told)
        else:
            parser.add_argument(flag_name(option.name), metavar=option.metadata["metavar"], help=told)


if __name__ == "__main__":
    main()
