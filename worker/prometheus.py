"""The worker's figures as Prometheus reads them: ``GET /metrics`` (docs/sidecar_metrics.md).

Made anew for every scrape from the same report as ``/healthz``, in a registry of its own: no global state. Numbers, run
ids and states alone; no text of a training is ever among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from sidestep import __version__
from sidestep.worker.sinks.wandb_progress import SinkState

MAX_ENDED_RUNS: Final = 16
"""Runs that have ended are shown up to so many, the newest; all that go on are."""

Report = Mapping[str, Any]
Labels = tuple[str, ...]
Values = Mapping[Any, Any]
"""The labels' values, a tuple of texts, to a number."""


def exposition(report: Report, accepted: str = "") -> tuple[bytes, str]:
    """Return the body and its content type, in the format that ``accepted`` (an Accept header) asks for."""
    registry = CollectorRegistry()
    registry.register(_Figures(report))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accepted)
    return encode(registry), content_type


class _Figures(Collector):
    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> Iterable[Metric]:
        return [*_worker(self._report), *_intake(self._report), *_runs(self._report), *_sinks(self._report)]


def _gauge(name: str, meaning: str, values: Values, labels: Labels = ()) -> Metric:
    family = GaugeMetricFamily(f"sidestep_{name}", meaning, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


def _counter(name: str, meaning: str, values: Values, labels: Labels = ()) -> Metric:
    """``name`` is without ``_total``, which is what the format adds."""
    family = CounterMetricFamily(f"sidestep_{name}", meaning, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


def _worker(report: Report) -> Iterator[Metric]:
    info = {"version": __version__, "instance": str(report.get("instance", ""))}
    yield InfoMetricFamily("sidestep_worker", "The worker that answers", value=info)
    yield _gauge("healthy", "1: what arrives is read and can be kept; sinks do not count", {(): report["healthy"]})
    yield _gauge("worker_start_time_seconds", "When the worker began, in unix seconds", {(): report["started_at"]})


def _intake(report: Report) -> Iterator[Metric]:
    received, journal, feed = report["receiver"], report["journal_state"], report["feed"]
    events = {(name,): count for name, count in received.items() if name not in {"peers", "waiting"}}
    yield _counter("receiver_events", "What the receiver did and met since the worker began", events, ("event",))
    yield _gauge("receiver_peers", "Connections of trainers", {(): received.get("peers", 0)})
    yield _gauge("receiver_waiting_messages", "Messages that wait for a commit", {(): received.get("waiting", 0)})
    yield from _journal(journal)
    yield _counter(
        "journal_messages", "Messages put on disk since the worker began", {(): received.get("journaled", 0)}
    )
    yield _gauge("feed_held_bytes", "Arrived bytes that wait in memory for assembly", {(): feed["held_bytes"]})
    yield _counter("feed_read_back_messages", "Messages read again from the journal", {(): feed["read_back"]})


def _journal(state: Mapping[str, Any]) -> Iterator[Metric]:
    """What cannot be known at the moment has no sample."""

    def figure(name: str) -> dict[Labels, Any]:
        return {(): state[name]} if state.get(name) is not None else {}

    damaged = {(): len(state["damaged"])} if "damaged" in state else {}
    yield _gauge("journal_bytes", "Size of the journal's files", figure("bytes"))
    yield _gauge("journal_max_bytes", "Size from which the oldest segments are deleted", figure("max_bytes"))
    yield _gauge("journal_free_bytes", "Free space of its file system", figure("free_bytes"))
    yield _gauge("journal_segments", "Files that hold messages", figure("segments"))
    yield _gauge("journal_damaged_segments", "Files set aside as broken", damaged)
    yield _counter("journal_segments_deleted", "Segments deleted to keep to the size", figure("segments_deleted"))
    yield _counter("journal_full", "How often the disk was full since the worker began", figure("times_full"))


def _shown(report: Report) -> dict[str, Mapping[str, Any]]:
    runs: Mapping[str, Mapping[str, Any]] = report["runs"]
    ended = [run_id for run_id, run in runs.items() if run["is_ended"]]
    left_out = set(ended[:-MAX_ENDED_RUNS])
    return {run_id: run for run_id, run in runs.items() if run_id not in left_out}


def _runs(report: Report) -> Iterator[Metric]:
    runs = _shown(report)

    def figure(name: str) -> dict[Labels, Any]:
        return {(run_id,): run[name] for run_id, run in runs.items() if run.get(name) is not None}

    run = ("run",)
    yield _gauge("run_ended", "1: the newest attempt has ended and all of it is in the outbox", figure("is_ended"), run)
    yield _gauge("run_attempt", "Number of the newest attempt, from 0", figure("attempt"), run)
    yield _gauge("run_ranks", "Ranks that the trainer has", figure("world_size"), run)
    yield _gauge("run_ranks_heard", "Ranks of which a message has come", figure("ranks_heard"), run)
    yield _gauge(
        "run_lag_seconds", "How long the oldest open step has waited for its parts", figure("lag_seconds"), run
    )
    yield _gauge("run_since_heard_seconds", "Time since any rank was heard", figure("seconds_since_heard"), run)
    yield _gauge(
        "run_open_steps", "Steps of which something is here and that have not closed", figure("open_steps"), run
    )
    yield _gauge("run_closed_step", "Newest step that has closed; -1 for none", figure("closed_step"), run)
    yield _gauge("run_newest_step", "Largest of the ranks' last steps; -1 for none", figure("newest_step"), run)
    yield _gauge("run_slowest_step", "Smallest of the ranks' last steps; -1 for none", figure("slowest_step"), run)
    steps = {(run_id, rank): step for run_id, each in runs.items() for rank, step in each["last_steps"].items()}
    yield _gauge("rank_last_step", "Last step of each rank, where there are up to 64", steps, ("run", "rank"))
    yield _counter("run_late_parts", "Messages that came after their step had closed", figure("late_parts"), run)
    closed = {
        (run_id, name.removeprefix("closed_")): count
        for run_id, each in runs.items() for name, count in each.items()
        if name.startswith("closed_") and name != "closed_step"
    }  # fmt: skip
    yield _counter("run_closed_steps", "Steps closed since the worker began, by reason", closed, ("run", "reason"))
    yield _counter("messages_resent", "Messages that trainers sent again", figure("resent"), run)
    for name, meaning in (
        ("produced", "Messages that trainers made, lost ones included"),
        ("dropped", "Messages that trainers gave up"),
        ("refused", "Messages that this worker could not read"),
    ):
        counts = {(r, kind): each[name] for r, run in runs.items() for kind, each in run["messages"].items()}
        yield _counter(f"messages_{name}", meaning, counts, ("run", "kind"))


def _sinks(report: Report) -> Iterator[Metric]:
    shown = _shown(report)
    sinks = {(run_id, "wandb"): status for run_id, status in report["sinks"]["wandb"].items() if run_id in shown}
    labels = ("run", "sink")
    states = {(*key, state): status["state"] == state for key, status in sinks.items() for state in map(str, SinkState)}
    yield _gauge("sink_state", "1 for the state that the sink is in, 0 for the others", states, (*labels, "state"))
    behind = {key: status["entries_behind"] for key, status in sinks.items()}
    yield _gauge("sink_unsent_entries", "Entries of the outbox that the sink was not given yet", behind, labels)
    unconfirmed = {key: status["entries_unconfirmed"] for key, status in sinks.items()}
    yield _gauge("sink_unconfirmed_entries", "Entries that it may lack, handed over or not", unconfirmed, labels)
    rows = {key: status["rows_behind"] for key, status in sinks.items()}
    yield _gauge("sink_unsent_rows", "Rows and tables among them", rows, labels)
    restarts = {key: status["counts"].get("respawns", 0) for key, status in sinks.items()}
    yield _counter("sink_restarts", "How often the sink's process was started again", restarts, labels)
    events = {
        (*key, name): count for key, status in sinks.items() for name, count in status["counts"].items()
        if name != "respawns"
    }  # fmt: skip
    console = {("", "console", name): count for name, count in report["sinks"]["console"].items()}
    yield _counter("sink_events", "What a sink did and met", {**events, **console}, (*labels, "event"))
