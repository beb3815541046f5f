"""``sidestep status``: how a journal's worker is; where none is, since when, and what the journal holds.

Exit code 0: healthy. 1: it says that it is not, or none answers, or there is no such journal. 2: used wrongly.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sidestep.worker.health import ask_health
from sidestep.worker.home import home_folder, journal_in, latest_journal

MAX_ENDED_RUNS: Final = 5
"""Runs that have ended are shown up to so many, the newest; ``--json`` has all."""

Figures = Mapping[str, Any]


def execute(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Say how the worker is; return the exit code.

    Raises:
        JournalError: there is no such journal.
    """
    journal = journal_in(options.journal or latest_journal(home_folder()))
    answer = ask_health(journal)
    answers = "receiver" in answer
    if not answers:
        # A container's health check asks every few seconds: it does not load what reads a journal.
        from sidestep.worker.holdings import holdings  # noqa: PLC0415

        answer = {**answer, "journal": str(journal), "worker": _whereabouts(answer), "holds": holdings(journal)}
    if options.json:
        say(json.dumps(answer, indent=2, sort_keys=True))
    else:
        for line in _page(answer) if answers else _page_without_worker(answer, journal):
            say(line)
    return 0 if answer.get("healthy") else 1


def _whereabouts(answer: Figures) -> str:
    """Return ``none``, ``ended`` (in order), ``gone`` (killed) or ``silent`` (its process is there)."""
    from sidestep.worker.trainers import is_alive  # noqa: PLC0415  (as above)

    if "pid" not in answer:
        return "none"
    if "ended_at" in answer:
        return "ended"
    return "silent" if is_alive(int(answer["pid"])) else "gone"


# ---------------------------------------------------------------------------------------------------- a living worker


def _page(answer: Figures) -> Iterator[str]:
    now = time.time()
    state = "healthy" if answer["healthy"] else f"not healthy: {answer['reason']}"
    yield f"{state}: process {answer['pid']} at {answer['endpoint']}, for {_span(now - answer['started_at'])}"
    received, size = answer["receiver"], answer["journal_state"]
    files = f"{_bytes(size.get('bytes', 0))} in {_counted(size.get('segments', 0), 'segment')}"
    yield (f"journal: {answer['journal']} ({files}; {received.get('journaled', 0)} messages since the start)")
    yield (
        f"queues: {received.get('waiting', 0)} messages wait for the disk, {_bytes(answer['feed']['held_bytes'])} for "
        f"assembly; {_counted(received.get('peers', 0), 'connection')}"
    )
    sinks = answer["sinks"]["wandb"]
    ended = [run_id for run_id, run in answer["runs"].items() if run["is_ended"]]
    for run_id, run in answer["runs"].items():
        if run_id not in ended[:-MAX_ENDED_RUNS]:
            yield from _run_lines(run_id, run, sinks.get(run_id))
    if len(ended) > MAX_ENDED_RUNS:
        yield f"and {len(ended) - MAX_ENDED_RUNS} runs that ended before"
    if not answer["runs"]:
        yield f"no run has come yet: a trainer finds this worker with SIDESTEP_ENDPOINT={answer['endpoint']}"
    if answer["warnings"]:
        yield "to be looked at:"
    for text in answer["warnings"]:
        yield f"  - {text}"


def _run_lines(run_id: str, run: Figures, sink: Figures | None) -> Iterator[str]:
    heard = run["seconds_since_heard"]
    if run["is_ended"]:
        state = "ended"
    elif heard is None:
        state = "its trainer is not here"
    else:
        state = f"heard {heard:.1f} s ago"
    yield (
        f"run {run_id}: {state}; step {run['closed_step']} closed, {_counted(run['open_steps'], 'step')} open, lag "
        f"{run['lag_seconds']:.1f} s{_attempt(run['attempt'])}"
    )
    yield f"  ranks     {run['ranks_heard']} of {run['world_size']} heard{_last_steps(run)}"
    yield from _message_lines(run)
    if sink is not None and sink["state"] != "disabled":
        process = f", process {sink['pid']}" if sink["pid"] else ""
        restarts = sink["counts"].get("respawns", 0)
        again = f", started again {_counted(restarts, 'time')}" if restarts else ""
        yield f"  W&B       {sink['state']}, {_counted(sink['entries_behind'], 'entry')} behind{process}{again}"


def _message_lines(run: Figures) -> Iterator[str]:
    messages = run["messages"].values()
    if not messages:
        return  # nothing has come since this worker began
    made, dropped, refused = (sum(each[name] for each in messages) for name in ("produced", "dropped", "refused"))
    yield f"  messages  {made} made, {dropped} dropped, {refused} refused, {run['resent']} sent again"
    for kind, each in run["messages"].items():
        if each["dropped"] or each["refused"]:
            yield f"            {kind}: {each['dropped']} dropped, {each['refused']} refused"


def _attempt(number: int) -> str:
    return f", attempt {number}" if number else ""


def _last_steps(run: Figures) -> str:
    if run["newest_step"] < 0:
        return ""
    steps = run["last_steps"]
    if len(steps) > 1 and run["slowest_step"] < run["newest_step"]:
        return "; last step " + ", ".join(f"rank {rank}: {step}" for rank, step in steps.items())
    if run["slowest_step"] < run["newest_step"]:
        return f"; last step {run['slowest_step']} to {run['newest_step']}"
    return f"; last step {run['newest_step']}"


# ------------------------------------------------------------------------------------------------------- no worker


def _page_without_worker(answer: Figures, journal: Path) -> Iterator[str]:
    held, since = answer["holds"], _since(answer)
    yield f"not healthy: {since}"
    yield (
        f"journal: {journal} ({_bytes(held['bytes'])}, {held['messages']} messages; last written "
        f"{_clock(held['last_written'])})"
    )
    behind = answer.get("behind") or {}
    for run_id, run in list(held["runs"].items())[-MAX_ENDED_RUNS:]:
        how = f"ended with {run['exit_code']}" if run["is_ended"] else "not ended"
        lacks = f"; W&B lacked {behind[run_id]} entries" if behind.get(run_id) else ""
        yield (
            f"run {run_id}: {how}, step {run['closed_step']} closed, {_counted(run['rows'], 'row')}"
            f"{_attempt(run['attempts'] - 1)}{lacks}"
        )
    if len(held["runs"]) > MAX_ENDED_RUNS:
        yield f"and {len(held['runs']) - MAX_ENDED_RUNS} runs before"
    if held.get("problem"):
        yield f"it cannot be read as it is: {held['problem']}"
    if behind or answer["worker"] in {"gone", "silent"}:
        options = " --until-idle" if answer["worker"] == "ended" else ""
        at = f"--journal {journal} --endpoint {answer['endpoint']}"
        yield f"to go on where it stopped, W&B included: sidestep worker {at}{options}"
    yield f"to rebuild its runs from what it holds: sidestep replay {journal}"


def _since(answer: Figures) -> str:
    match answer["worker"]:
        case "none":
            return str(answer["reason"])
        case "ended":
            return f"no worker: the last one (process {answer['pid']}) ended in order at {_clock(answer['ended_at'])}"
        case "gone":
            last = _clock(answer["holds"]["last_written"])
            return (
                f"no worker: the last one (process {answer['pid']}, started at {_clock(answer['started_at'])}) is gone "
                f"without a word; the last it wrote is of {last}"
            )
        case _:
            return f"{answer['reason']}; its process is there, but is stopped or stuck"


def _clock(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds)) if unix_seconds else "never"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.1f} h"


def _bytes(count: int) -> str:
    if count < 1_000:
        return f"{count} B"
    return (
        f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
    )


def _counted(number: int, name: str) -> str:
    plural = f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"
    return f"{number} {name if number == 1 else plural}"
