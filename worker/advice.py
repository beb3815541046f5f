"""What a worker's figures call for: each line says what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from sidestep.worker.sinks.wandb_trouble import told, trouble_of

SILENT_SECONDS: Final = 60.0
"""A trainer beats every few seconds, whatever it is busy with."""
LAGGING_SECONDS: Final = 10.0
BEHIND_ENTRIES: Final = 1_000

Figures = Mapping[str, Any]


def warnings(report: Figures) -> list[str]:
    """Return what is to be looked at, the gravest first; nothing where all is well."""
    found = []
    if report.get("reason"):
        found.append(
            f"{report['reason']}. The trainer goes on and keeps what it can (64 MiB a rank); nothing that was acked is "
            "lost. Look at the worker's log"
        )
    journal = report.get("journal_state", {})
    if journal.get("damaged"):
        files = "; ".join(f"{each['file']} ({each['reason']})" for each in journal["damaged"])
        found.append(
            f"broken files of the journal were set aside: {files}. Look at the disk; new messages go elsewhere"
        )
    if journal.get("times_full"):
        found.append("the disk was full; what was acked is kept. Give the journal space, or lower journal_max_bytes")
    found += _of_the_door(report.get("receiver", {}))
    for run_id, run in report.get("runs", {}).items():
        found += _of_run(run_id, run)
    for run_id, sink in report.get("sinks", {}).get("wandb", {}).items():
        found += _of_sink(run_id, sink)
    return found


def _of_the_door(received: Figures) -> Iterator[str]:
    for name, what in (
        ("refused_without_key", "connections came without a key: set SIDESTEP_KEYS for every rank"),
        (
            "refused_unknown_key",
            "connections came with a key that is not in clients/: copy client.secret there anew",
        ),
        ("refused_wrong_server_key", "connections expect another worker's key: copy this one's server.public there"),
    ):
        if received.get(name):
            yield f"{received[name]} {what}. If no rank is missing, somebody else tries this port"


def _of_run(run_id: str, run: Figures) -> Iterator[str]:
    messages = run.get("messages", {})
    dropped = {kind: each["dropped"] for kind, each in messages.items() if each["dropped"]}
    if dropped:
        yield (
            f"run {run_id}: the trainer gave up {_listed(dropped)}: no worker took them in time, or its copies from "
            "the device were too many. Charts have gaps there; raise window_bytes or staging_bytes, or intervals"
        )
    refused = {kind: each["refused"] for kind, each in messages.items() if each["refused"]}
    if refused:
        yield (
            f"run {run_id}: {_listed(refused)} could not be read and will never be stored. Trainer and worker may be "
            "of different versions: install the same one on both sides"
        )
    if run.get("closed_deadline"):
        yield (
            f"run {run_id}: {run['closed_deadline']} steps closed without all their parts after "
            "assembly_deadline_seconds. A rank hangs, or its messages do not arrive: see the last step per rank"
        )
    if run.get("unprojected"):
        yield f"run {run_id}: {run['unprojected']} steps could not be worked out: the worker's log says why"
    yield from _of_living_run(run_id, run)


def _of_living_run(run_id: str, run: Figures) -> Iterator[str]:
    if run.get("is_ended"):
        return
    silent = run.get("seconds_since_heard")
    if silent is not None and silent > SILENT_SECONDS:
        yield (
            f"run {run_id}: nothing was heard of the trainer for {silent:.0f} s. If it lives, look for its console's "
            "line about the worker; if it is gone, the run is ended as failed before long"
        )
    elif 0 < run.get("ranks_heard", 0) < run.get("world_size", 1):
        yield (
            f"run {run_id}: {run['ranks_heard']} of {run['world_size']} ranks are heard. Every rank needs attach() and "
            "the same SIDESTEP_ENDPOINT"
        )
    if run.get("lag_seconds", 0.0) > LAGGING_SECONDS:
        yield (
            f"run {run_id}: a step has waited {run['lag_seconds']:.0f} s for its parts; it closes without them after "
            "assembly_deadline_seconds"
        )


def _of_sink(run_id: str, sink: Figures) -> Iterator[str]:
    counts, behind = sink.get("counts", {}), sink.get("entries_behind", 0)
    if sink.get("complaint"):
        trouble = trouble_of(sink["complaint"], is_given_up=bool(sink.get("is_given_up")))
        yield f"{told(run_id, sink['complaint'], trouble)} It lacks {behind} entries; nothing waits for it"
    elif behind > BEHIND_ENTRIES:
        yield f"run {run_id}: W&B lacks {behind} entries and catches up at its own rate; nothing is to be done"
    if counts.get("stop_requests"):
        yield f"run {run_id}: somebody pressed Stop on its W&B page; the trainer has been told"
    if sink.get("entries_refused"):
        yield f"run {run_id}: {sink['entries_refused']} entries cannot be told to W&B (sidecar/refused_row)"


def _listed(counts: Mapping[str, int]) -> str:
    named = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{sum(counts.values())} messages ({named})"
