"""The two pages: where they listen, what they answer, and which runs they name."""

from __future__ import annotations

import http.client
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families

from sidestep.worker.errors import WorkerError
from sidestep.worker.health import HealthServer, is_loopback
from sidestep.worker.prometheus import MAX_ENDED_RUNS, _Figures, exposition

IDLE_RUN: dict[str, Any] = {
    "is_ended": True, "attempt": 0, "world_size": 1, "ranks_heard": 0, "lag_seconds": 0.0, "seconds_since_heard": None,
    "open_steps": 0, "closed_step": 3, "newest_step": -1, "slowest_step": -1, "last_steps": {}, "late_parts": 0,
    "messages": {}, "resent": 0,
}  # fmt: skip


def report(num_ended: int = 0, *, healthy: bool = True) -> dict[str, Any]:
    runs = {f"run-{number}": IDLE_RUN for number in range(num_ended)}
    return {
        "healthy": healthy, "instance": "i", "started_at": 1.0, "receiver": {"frames": 2}, "journal_state": {},
        "feed": {"held_bytes": 0, "read_back": 0}, "runs": {"living": {**IDLE_RUN, "is_ended": False}, **runs},
        "sinks": {"console": {"shown": 1}, "wandb": {}},
    }  # fmt: skip


class Asked:
    def __init__(self) -> None:
        self.healthy = True

    def report(self) -> dict[str, Any]:
        return report(healthy=self.healthy)


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def server(asked: Asked) -> Iterator[HealthServer]:
    made = HealthServer(asked.report)
    yield made
    made.close()


def ask(server: HealthServer, page: str, **headers: str) -> tuple[int, str, str]:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
    try:
        connection.request("GET", page, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def test_healthz_is_json_with_the_status_of_the_health(server: HealthServer, asked: Asked) -> None:
    status, kind, body = ask(server, "/healthz")
    assert (status, kind, json.loads(body)["healthy"]) == (200, "application/json", True)
    asked.healthy = False
    assert ask(server, "/healthz")[0] == 503
    assert ask(server, "/metrics")[0] == 200, "figures are there for an ill worker, too"


def test_metrics_come_in_both_formats_of_prometheus(server: HealthServer) -> None:
    status, kind, body = ask(server, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain")
    plain = {family.name for family in text_string_to_metric_families(body)}
    assert {"sidestep_healthy", "sidestep_receiver_events", "process_resident_memory_bytes"} <= plain
    _, kind, body = ask(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    open_metrics = parse_open_metrics(body)  # type: ignore[no-untyped-call]
    assert {family.name for family in open_metrics} >= {"sidestep_worker", "sidestep_run_closed_step"}


def test_there_is_no_other_page(server: HealthServer) -> None:
    assert ask(server, "/")[0] == 404
    assert ask(server, "/metrics/../healthz")[0] == 404


def test_a_port_that_is_taken_is_named(server: HealthServer) -> None:
    port = urlsplit(server.url).port
    assert port
    with pytest.raises(WorkerError, match=f"127.0.0.1:{port} cannot be listened on"):
        HealthServer(report, port)


def test_only_who_asks_for_it_is_heard_beyond_loopback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        quiet = HealthServer(report)
        assert caplog.messages == []
        open_to_all = HealthServer(report, host="0.0.0.0")  # noqa: S104
    try:
        assert quiet._server.server_address[0] == "127.0.0.1"
        assert "open to whoever reaches" in caplog.text
        assert urlsplit(open_to_all.url).hostname == "127.0.0.1"
        assert ask(open_to_all, "/healthz")[0] == 200
    finally:
        quiet.close()
        open_to_all.close()


@pytest.mark.parametrize(
    ("host", "is_it"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("::", False),
     ("10.0.0.1", False), ("", False), ("host.example", False)],
)  # fmt: skip
def test_what_is_loopback(host: str, is_it: bool) -> None:
    assert is_loopback(host) is is_it


def test_of_runs_that_have_ended_the_newest_are_named() -> None:
    body, _ = exposition(report(MAX_ENDED_RUNS + 5))
    (ended,) = [each for each in text_string_to_metric_families(body.decode()) if each.name == "sidestep_run_ended"]
    shown = {sample.labels["run"] for sample in ended.samples}
    assert shown == {"living", *(f"run-{number}" for number in range(5, MAX_ENDED_RUNS + 5))}


def test_the_page_has_the_figures_that_the_documentation_lists() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "sidecar_metrics.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(sidestep_\w+)` \| (\w+) \| ([\w, ]*) \| ([^|]+) \|$", text, re.MULTILINE)
    assert len(listed) > 30
    families = [each for each in _Figures(report()).collect() if each.name.startswith("sidestep_")]
    suffixes = {"counter": "_total", "info": "_info"}
    made = [
        (
            each.name + suffixes.get(each.type, ""),
            each.type,
            ", ".join(getattr(each, "_labelnames", ())),
            each.documentation,
        )
        for each in families
    ]
    assert made == listed


def test_two_pages_share_no_state() -> None:
    bodies = {exposition(report(num_ended))[0].decode().count("sidestep_run_ended{") for num_ended in (3, 3, 1)}
    assert bodies == {4, 2}
