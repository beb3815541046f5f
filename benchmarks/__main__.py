"""Run all benchmarks one after another, and write their figures into one file and one page.

    python -m benchmarks [--quick] [--only NAME ...] [--json FILE] [--markdown FILE]
    python -m benchmarks --write-readme FILE.json

A full run of all parts is written to benchmarks/results/DATE-HARDWARE.json and .md; any other is written where it is
told to. What a machine cannot do is skipped, and the page says why. The exit status is 1 where a part failed; the
others are measured all the same. The second form puts the table of a step's cost into README.md, from a committed file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import suite
from benchmarks.page import overhead_block, page, with_block
from benchmarks.surroundings import surroundings

RESULTS = Path("benchmarks") / "results"


def arguments() -> argparse.ArgumentParser:
    """Return the suite's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in suite.PARTS]
    parser.add_argument("--quick", action="store_true", help="little of everything: shows that it runs")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"these parts: {', '.join(names)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument(
        "--nanovlm", type=Path, default=os.environ.get("SIDESTEP_NANOVLM"), metavar="CHECKOUT",
        help="of nanoVLM, for nanovlm_step (SIDESTEP_NANOVLM)",
    )  # fmt: skip
    parser.add_argument("--write-readme", type=Path, metavar="FILE", help="measure nothing: render README.md's table")
    return parser


def write_readme(root: Path, file: Path) -> None:
    """Put the table of what a step costs into ``root``/README.md, from a file of its benchmarks/results.

    Raises:
        ValueError: the file is not there, or holds no full run, or the README has no place for the table.
    """
    try:
        name = file.resolve().relative_to(root.resolve()).as_posix()
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no JSON file of {root / RESULTS}: {error}") from error
    readme = root / "README.md"
    readme.write_text(with_block(readme.read_text(encoding="utf-8"), overhead_block(name, content)), encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen parts; return all figures."""
    only = ["--only", *options.only] if options.only else []
    machine = surroundings(suite.ROOT, quick=options.quick)
    began = datetime.now(UTC)
    return {
        "command": " ".join(["python -m benchmarks", *["--quick"] * options.quick, *only]),
        "date": began.strftime("%Y-%m-%d"),
        "began": began.isoformat(timespec="seconds"),
        "quick": options.quick,
        "machine": machine.as_json(),
        "name": f"{began:%Y-%m-%d}-{machine.name()}",
        "parts": suite.run_parts(suite.select(options.only), machine, _say),
    }


def _place(options: argparse.Namespace, told: Path | None, result: Mapping[str, Any], ending: str) -> Path | None:
    """Return where a file goes: where it was told to, else among the results if it is a whole run, else nowhere."""
    is_whole = not options.quick and options.only is None
    return suite.ROOT / RESULTS / f"{result['name']}.{ending}" if told is None and is_whole else told


def _write(file: Path | None, text: str) -> None:
    if file is not None:
        file.write_text(text, encoding="utf-8")
        _say(f"written: {file}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(given: Sequence[str] | None = None) -> int:
    """Measure and write, or render README.md; return the exit status."""
    parser = arguments()
    options = parser.parse_args(given)
    if options.write_readme is not None:
        try:
            write_readme(suite.ROOT, options.write_readme)
        except ValueError as error:
            parser.error(str(error))
        return 0
    if options.nanovlm is not None:
        os.environ["SIDESTEP_NANOVLM"] = str(Path(options.nanovlm).resolve())
    result = measure(options)
    _write(_place(options, options.json, result, "json"), json.dumps(result, indent=1) + "\n")
    made = page(result)
    _write(_place(options, options.markdown, result, "md"), made)
    print(made)
    return int(any(outcome["status"] == suite.FAILED for outcome in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
