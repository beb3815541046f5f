"""Charts as plain Plotly figures: made by the library here, drawn by its script in the page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from sidestep.worker.sinks.report.history import RunHistory, Series

COLORS = ("#4361ee", "#e4572e", "#2a9d8f", "#9b5de5", "#f4a261", "#577590", "#d62976", "#6a994e")
MAX_LINES = 24
"""Lines of one chart; more cannot be told apart."""
_GRID = "rgba(128,128,128,0.18)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure and what it is called."""

    title: str
    figure: go.Figure


def label(text: str) -> str:
    """Return a run's text so that Plotly, which reads some HTML in labels, shows it as it is."""
    return html.escape(text)


def line_chart(
    history: RunHistory,
    title: str,
    keys: Mapping[str, str],
    *,
    log: bool = False,
    thresholds: Mapping[str, float] = {},
    span: tuple[float, float] | None = None,
) -> Chart | None:
    """Return a chart of ``keys`` (key to its name in the legend) against the step; None where none was written.

    ``thresholds`` are drawn as dotted lines; ``span`` fixes the vertical axis.
    """
    present = [(key, name) for key, name in keys.items() if key in history.series][:MAX_LINES]
    if not present:
        return None
    figure = go.Figure()
    for number, (key, name) in enumerate(present):
        steps, values = _with_gaps(history.series[key])
        figure.add_scatter(
            x=steps,
            y=values,
            name=label(name),
            mode="lines+markers" if len(steps) < 60 else "lines",
            line={"color": COLORS[number % len(COLORS)], "width": 2},
            marker={"size": 5},
        )
    for name, value in thresholds.items():
        figure.add_hline(y=value, line={"dash": "dot", "width": 1, "color": "#e4572e"}, annotation_text=label(name))
    _dress(figure, log=log, legend=len(present) > 1)
    if span is not None:
        figure.update_yaxes(range=span)
    return Chart(title=title, figure=figure)


def bar_chart(title: str, edges: Sequence[float], counts: Sequence[float], axis: str) -> Chart:
    """Return a histogram whose counts [n] stand between ``edges`` [n + 1]."""
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    widths = [high - low for low, high in pairwise(edges)]
    figure = go.Figure(go.Bar(x=centres, y=list(counts), width=widths, marker={"color": COLORS[0]}))
    _dress(figure, log=False, legend=False)
    figure.update_xaxes(title=axis)
    return Chart(title=title, figure=figure)


def heat_chart(title: str, records: Sequence[tuple[int, list[float], list[float]]], axis: str) -> Chart:
    """Return how a histogram moved: steps across, its bins upward, each column its share of the elements."""
    edges = records[-1][2]
    same = [record for record in records if record[2] == edges]
    columns = [[count / (sum(counts) or 1.0) for count in counts] for _, counts, _ in same]
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    figure = go.Figure(
        go.Heatmap(
            x=[step for step, _, _ in same],
            y=centres,
            z=[list(row) for row in zip(*columns, strict=True)],
            colorscale="Viridis",
            showscale=False,
        )
    )
    _dress(figure, log=False, legend=False)
    figure.update_yaxes(title=axis, range=_occupied(centres, columns))
    return Chart(title=title, figure=figure)


def figure_json(figure: go.Figure) -> str:
    """Return a figure as JSON that may stand inside a script element."""
    text: str = figure.to_json()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _with_gaps(series: Series) -> tuple[list[int | None], list[float | None]]:
    """A new attempt goes back in steps: its line begins anew instead of being drawn backwards."""
    steps: list[int | None] = []
    values: list[float | None] = []
    before: int | None = None
    for step, value, attempt in zip(series.steps, series.values, series.attempts, strict=True):
        if before is not None and attempt != before:
            steps.append(None)
            values.append(None)
        steps.append(step)
        values.append(value)
        before = attempt
    return steps, values


def _occupied(centres: Sequence[float], columns: Sequence[Sequence[float]]) -> list[float]:
    used = [centre for at, centre in enumerate(centres) if any(column[at] > 0 for column in columns)]
    return [min(used, default=centres[0]) - 0.5, max(used, default=centres[-1]) + 0.5]


def _dress(figure: go.Figure, *, log: bool, legend: bool) -> None:
    layout: dict[str, Any] = {
        "margin": {"l": 52, "r": 14, "t": 10, "b": 36},
        "height": 280,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#7a8194"},
        "showlegend": legend,
        "legend": {"orientation": "h", "y": 1.12, "x": 0},
        "hovermode": "x unified" if legend else "closest",
    }
    figure.update_layout(**layout)
    # Fixed margins: automatic ones make the script lay a chart out again and again.
    figure.update_xaxes(gridcolor=_GRID, zerolinecolor=_GRID, automargin=False)
    figure.update_yaxes(gridcolor=_GRID, zerolinecolor=_GRID, automargin=False, type="log" if log else "linear")
