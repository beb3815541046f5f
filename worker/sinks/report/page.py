"""The page itself: plain HTML, one style sheet, no request. Everything that comes from a run is escaped here."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from plotly.offline import get_plotlyjs

from sidestep.worker.sinks.report.charts import Chart, figure_json
from sidestep.worker.sinks.report.history import RunHistory, TableRecord
from sidestep.worker.sinks.report.sections import Section, TableView
from sidestep.worker.sinks.report.style import STYLE
from sidestep.worker.sinks.report.verdict import Verdict

MAX_EARLIER_TABLES = 12
"""Earlier records of a table that stay in the page, folded; every record is in the journal and in W&B."""

MAX_TABLE_ROWS = 500
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_NOTHING = "Nothing was measured here: its interval was not reached, or there was nothing to measure."
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}\Z")
_DRAW = """
for (const box of document.querySelectorAll('[data-figure]')) {
  const figure = JSON.parse(document.getElementById(box.dataset.figure).textContent);
  Plotly.newPlot(box, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: false});
}
document.body.dataset.drawn = document.querySelectorAll('.js-plotly-plot').length;
"""


def render_page(history: RunHistory, verdict: Verdict, sections: Sequence[Section]) -> str:
    """Return the whole page."""
    numbering = iter(range(1 << 30))
    body = "".join(
        [_header(history), _verdict(history, verdict), _messages(history), _navigation(sections)]
        + [_section(section, numbering) for section in sections]
        + [_about(history)]
    )
    title = _text(history.run.get("name") or history.run.get("run_id") or "run")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title} · Sidestep report</title><style>{STYLE}</style>'
        f"<script>{get_plotlyjs()}</script></head><body><main>{body}</main><script>{_DRAW}</script></body></html>"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _header(history: RunHistory) -> str:
    run = history.run
    tags = "".join(f'<span class="tag">{_text(tag)}</span>' for tag in run.get("tags", ()))
    project = " / ".join(_text(run[key]) for key in ("entity", "project") if run.get(key))
    name = _text(run.get("name") or run.get("run_id", "run"))
    return (
        '<header><div class="brand">sidestep</div>'
        f'<div><h1>{name}</h1><p class="dim">{project} {tags}</p></div></header>'
    )


def _verdict(history: RunHistory, verdict: Verdict) -> str:
    details = "".join(f"<p>{_text(detail)}</p>" for detail in verdict.details)
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{_text(name)}</span></div>' for name, value in _tiles(history)
    )
    headline = _text(verdict.headline)
    return (
        f'<section class="verdict {verdict.level}" id="verdict"><div class="lamp"></div>'
        f"<div><h2>{headline}</h2>{details}</div>"
        f'<div class="tiles">{tiles}</div></section>'
    )


def _tiles(history: RunHistory) -> Iterable[tuple[str, str]]:
    yield "newest step", _number(history.newest_step)
    loss = history.series.get("loss/total")
    if loss is not None:
        yield "loss, first to last", f"{loss.values[0]:.3g} → {loss.newest:.3g}"
    for key, name in (
        ("generation/avg_length", "generated length"),
        ("collapse/most_common_ratio", "top token's share"),
        ("gradients/global/total_norm", "gradient norm"),
    ):
        value = history.newest(key)
        if value is not None:
            yield name, _number(value)
    if history.first_time is not None and history.last_time is not None and history.last_time > history.first_time:
        yield "minutes", f"{(history.last_time - history.first_time) / 60:.1f}"


def _messages(history: RunHistory) -> str:
    raised = [str(alert.get("text", "")) for alert in history.alerts]
    said = [
        notice
        for notice in history.notices
        if notice.get("level") in ("warning", "critical")
        and not any(text.startswith(str(notice.get("text", ""))) for text in raised)
    ]
    told = [(str(alert.get("level", "critical")), str(alert.get("text", ""))) for alert in history.alerts]
    lines = told + [(str(line["level"]), str(line.get("text", ""))) for line in said]
    if not lines:
        return ""
    items = "".join(f'<li class="{_text(level)}">{_text(text)}</li>' for level, text in dict.fromkeys(lines))
    return f'<section class="messages"><h3>Warnings</h3><ul>{items}</ul></section>'


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _navigation(sections: Sequence[Section]) -> str:
    return "<nav>" + "".join(f'<a href="#{_slug(s.title)}">{_text(s.title)}</a>' for s in sections) + "</nav>"


def _section(section: Section, numbering: Iterable[int]) -> str:
    charts = "".join(_chart(chart, next(iter(numbering))) for chart in section.charts)
    tables = "".join(map(_table, section.tables))
    if not charts and not tables:
        charts = f'<p class="dim">{_NOTHING}</p>'
    return (
        f'<section id="{_slug(section.title)}"><h2>{_text(section.title)}</h2>'
        f'<p class="dim">{_text(section.summary)}</p>'
        f'<div class="charts">{charts}</div>{tables}</section>'
    )


def _chart(chart: Chart, number: int) -> str:
    return (
        f'<figure><figcaption>{_text(chart.title)}</figcaption><div data-figure="figure-{number}"></div>'
        f'<script type="application/json" id="figure-{number}">{figure_json(chart.figure)}</script></figure>'
    )


def _table(view: TableView) -> str:
    earlier = "".join(
        f"<details><summary>step {record.step}</summary>{_rows(record)}</details>"
        for record in view.earlier[:MAX_EARLIER_TABLES]
    )
    left_out = len(view.earlier) - MAX_EARLIER_TABLES
    if left_out > 0:
        earlier += f'<p class="dim">{left_out} earlier tables are in the journal.</p>'
    if earlier:
        earlier = f"<details><summary>{len(view.earlier)} earlier</summary>{earlier}</details>"
    return f"<h3>{_text(view.title)} <small>step {view.newest.step}</small></h3>{_rows(view.newest)}{earlier}"


def _rows(record: TableRecord) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in record.columns)
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in record.rows[:MAX_TABLE_ROWS])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(cell: Any) -> str:
    if isinstance(cell, dict):
        png = cell.get("png", "")
        if cell.get("_type") == "image" and isinstance(png, str) and _BASE64.match(png):
            return f'<td><img alt="" src="data:image/png;base64,{png}"></td>'
        return f"<td>{_text(json.dumps(cell, ensure_ascii=False))}</td>"
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return f'<td class="number">{_number(float(cell))}</td>'
    return f'<td class="text">{_text(cell)}</td>'


def _about(history: RunHistory) -> str:
    parts = [
        _folded(title, history.run.get(key))
        for title, key in (
            ("Configuration", "config"),
            ("Environment", "environment"),
            ("Sidestep's settings", "settings"),
        )
    ]
    made = datetime.fromtimestamp(history.last_time or 0, UTC).strftime("%Y-%m-%d %H:%M UTC")
    rows = f"{history.num_rows:,} rows, {history.attempts} attempt{'s' if history.attempts != 1 else ''}"
    last = f'<p class="dim">{rows}, last row {made}.</p>'
    return f'<section id="about"><h2>About the run</h2>{"".join(parts)}{last}</section>'


def _folded(title: str, value: Any) -> str:
    if not value:
        return ""
    text = _text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
    return f"<details><summary>{_text(title)}</summary><pre>{text}</pre></details>"
