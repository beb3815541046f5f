"""The report in a real headless Chromium: every chart drawn, the tables there, no console error, no request."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.report_runs import HOSTILE, full_run, make_journal

from sidestep.worker.sinks.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--virtual-time-budget=20000",
    "--window-size=1300,2400",
)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
@pytest.mark.timeout(120)
def test_the_report_draws_itself_and_asks_nobody(tmp_path: Path) -> None:
    path = write_report(make_journal(tmp_path / "journal", full_run(HOSTILE)), None, tmp_path / "report.html")
    net_log = tmp_path / "net.json"
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={net_log}",
         "--enable-logging=stderr", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    page = done.stdout
    num_charts = page.count("data-figure=")
    assert num_charts >= 15
    assert f'data-drawn="{num_charts}"' in page
    assert page.count("<svg") >= num_charts
    assert page.count("<table>") >= 3
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert console == [], "the page must be silent in the browser's console"
    assert requested_hosts(net_log) == set()


def requested_hosts(net_log: Path) -> set[str]:
    """Return the hosts of requests that a page made; the browser's own at start-up name their initiator."""
    text = net_log.read_text(encoding="utf-8", errors="replace").rstrip().rstrip(",")
    try:
        events = json.loads(text)["events"]
    except ValueError:
        events = json.loads(text + "]}")["events"]
    urls = (event.get("params", {}) for event in events)
    made = {
        params["url"] for params in urls if params.get("initiator") not in (None, "not an origin") and "url" in params
    }
    return {match[1] for url in made if (match := re.match(r"(?:https?|wss?)://([^/]+)", url))}
