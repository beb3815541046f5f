"""The one page of a run of ``python -m benchmarks``, and the README's block that is made of the same file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks import suite
from benchmarks.table import MODES, TABLES, markdown

BEGIN, END = "<!-- overhead:begin -->", "<!-- overhead:end -->"
_BLOCK = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
_FILE = re.compile(r"\]\((benchmarks/results/[\w.-]+\.json)\)")

Result = Mapping[str, Any]


def page(result: Result) -> str:
    """Return all tables of a run, what was measured on what before them."""
    machine = result["machine"]
    parts = [part for part in suite.PARTS if part.name in result["parts"]]
    lines = [
        f"# Benchmarks, {result['date']}: {machine['device'] or machine['processor']}",
        "",
        "```bash",
        result["command"],
        "```",
        "",
        *_on_what(result),
        "",
    ]
    if result["quick"]:
        lines += ["**A quick run: it shows that everything runs. Its figures mean nothing.**", ""]
    for part in parts:
        lines += [f"## {part.question}", "", _section(part.name, result["parts"][part.name]), ""]
    return "\n".join(lines)


def _on_what(result: Result) -> list[str]:
    machine = result["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    device = f", {machine['device']} ({machine['device_bytes'] / (1 << 30):.0f} GiB)" if machine["device"] else ""
    facts = {
        "machine": f"{machine['hardware']} ({machine['usable_cores']} usable), {machine['processor']}"
        f"{device or ', no CUDA device'}",
        "load at the start": f"{machine['load_before']:.2f}",
        "commit": machine["commit"] or "not known",
        "Python": machine["python"],
        "versions": versions,
    }
    return [f"- {name}: {fact}" for name, fact in facts.items()]


def _section(name: str, outcome: Mapping[str, Any]) -> str:
    if outcome["status"] == suite.SKIPPED:
        return f"Skipped: {outcome['reason']}."
    how = f"`{outcome['command']}`, {outcome['seconds']:.0f} s, load before it {outcome['load_before']:.2f}."
    if outcome["status"] == suite.FAILED:
        return f"**Failed**: `{outcome['reason'].replace('`', chr(39))}`\n\n{how}"
    note = f" Note: {outcome['note']}." if outcome["note"] else ""
    return f"{TABLES[name](outcome['figures'])}\n\n{how}{note}"


def overhead_block(file: str, content: Mapping[str, Any]) -> str:
    """Return the README's block, markers included, from a file of ``benchmarks/results``.

    Args:
        file: its path from the checkout's root, to which the block links.
        content: a whole run of the suite, or of ``step_overhead.py`` alone.

    Raises:
        ValueError: the file is named otherwise than the results are, or holds no full run of the step's benchmark.
    """
    if not _FILE.fullmatch(f"]({file})"):
        raise ValueError(f"{file}: the README names a committed file, benchmarks/results/NAME.json")
    figures = _step_figures(file, content)
    rows = []
    for mode, row in figures["modes"].items():
        name, share = MODES[mode], f"{figures['share_of_step'][mode]:.2%}"
        bold = "**" if mode.startswith("sidestep") else ""
        cells = [f"{bold}{name}{bold}", f"{bold}{share}{bold}" if mode != "none" else ""]
        rows.append([*cells, f"{row['thread_cpu_mean_ms']:.1f}"])
    table = markdown(("", "share of a step", "training thread's CPU, mean ms"), rows)
    threads = figures.get("threads", 1)  # files from before it was written were taken with the default
    on_what = (
        f"({figures['date']}; {figures['hardware']}, {figures['processor']}; "
        f"{threads} thread{'' if threads == 1 else 's'}, {figures['steps_per_mode']} steps each, default intervals)"
    )
    lines = (
        BEGIN,
        f"Measured on the demo, side by side in one run {on_what}:",
        f"[the figures]({file}). `python -m benchmarks --only step_overhead` takes them anew;",
        "[docs/overhead.md](docs/overhead.md) has more of them.",
        "",
        table,
        END,
    )
    return "\n".join(lines)


def _step_figures(file: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    if "parts" not in content:
        found: Mapping[str, Any] = content
    else:
        outcome = content["parts"].get("step_overhead", {})
        if content["quick"] or outcome.get("status") != suite.MEASURED:
            raise ValueError(f"{file} holds no full measurement of step_overhead")
        found = outcome["figures"]
    if not MODES.keys() >= found.get("modes", {"": None}).keys():
        raise ValueError(f"{file} holds no figures of step_overhead")
    return found


def named_file(readme: str) -> str:
    """Return the file of results that the README's block names.

    Raises:
        ValueError: there is not just one block, or it names no file or several.
    """
    blocks = _BLOCK.findall(readme)
    files = _FILE.findall(blocks[0]) if len(blocks) == 1 else []
    if len(files) != 1:
        raise ValueError(f"the README has {len(blocks)} blocks of overhead, which name {len(files)} files of results")
    return str(files[0])


def with_block(readme: str, block: str) -> str:
    """Return the README with its block replaced.

    Raises:
        ValueError: there is not just one block.
    """
    if len(_BLOCK.findall(readme)) != 1:
        raise ValueError(f"the README needs one block between {BEGIN} and {END}")
    return _BLOCK.sub(lambda _: block, readme)
