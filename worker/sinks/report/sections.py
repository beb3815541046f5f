"""Which chart and table stands in which of the user's six sections (docs/metrics.md), and those that follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sidestep.protocol.metric_names import SECTIONS, spec_of
from sidestep.worker.sinks.report.charts import Chart, bar_chart, heat_chart, line_chart
from sidestep.worker.sinks.report.history import RunHistory, TableRecord

MAX_MODULE_HEATMAPS = 6
_ACCOUNTS = ("sidecar/dropped/{kind}", "sidecar/refused", "sidecar/refused/{kind}", "sidecar/resent")
_GRADIENT_LEAVES = ("norm", "mean", "std", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableView:
    """A table to show: the newest record open, the earlier ones folded."""

    title: str
    newest: TableRecord
    earlier: tuple[TableRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of the page."""

    title: str
    summary: str
    charts: tuple[Chart, ...]
    tables: tuple[TableView, ...]


def build_sections(history: RunHistory) -> list[Section]:
    """Return the six sections in the user's order, then the trainer's own numbers and the sidecar's accounts."""
    makers: dict[str, Callable[[RunHistory], Section]] = {
        "Generation Quality": _generation,
        "Collapse Detection": _collapse,
        "Loss Analysis": _loss,
        "Token Statistics": _tokens,
        "Gradient Health": _gradients,
        "Data Quality": _data,
    }
    sections = [makers[title](history) for title in SECTIONS]
    return [*filter(None, (_incidents(history),)), *sections, *filter(None, (_own(history), _sidecar(history)))]


def _keys(family: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{family}/{leaf}": name for leaf, name in names.items()}


def _unless_zero(history: RunHistory, title: str, key: str) -> Chart | None:
    """A chart of what should not happen is shown where it did."""
    return (
        line_chart(history, title, {key: key})
        if any(history.series[key].values if key in history.series else ())
        else None
    )


def _section(
    title: str, summary: str, charts: Iterable[Chart | None], tables: Iterable[TableView | None] = ()
) -> Section:
    return Section(
        title=title,
        summary=summary,
        charts=tuple(chart for chart in charts if chart is not None),
        tables=tuple(table for table in tables if table is not None),
    )


def _table(history: RunHistory, key: str, title: str) -> TableView | None:
    records = history.tables.get(key)
    if not records:
        return None
    return TableView(title=title, newest=records[-1], earlier=tuple(reversed(records[:-1])))


def _incidents(history: RunHistory) -> Section | None:
    """What the detectors said, first of all: shown where they said anything."""
    tables = [
        _table(history, "incidents/log", "Incidents"),
        _table(history, "incidents/samples", "Answers when it opened, worst first"),
    ]
    if not any(tables):
        return None
    open_now = line_chart(history, "Open incidents", {"incidents/open": "open"})
    return _section("Incidents", "What the detectors said, why, and what to do next.", [open_now], tables)


def _generation(history: RunHistory) -> Section:
    return _section(
        "Generation Quality",
        "What the model answers to the samples, greedily, up to the first EOS; the gold answer is never in the prompt.",
        [
            line_chart(
                history,
                "Generated length (tokens)",
                _keys("generation", {"avg_length": "average", "min_length": "shortest", "max_length": "longest"}),
            ),
            line_chart(
                history,
                "Empty and endless answers",
                _keys("generation", {"empty_ratio": "empty", "hit_max_ratio": "never ended"}),
            ),
        ],
        [_table(history, "generation/samples", "Samples")],
    )


def _collapse(history: RunHistory) -> Section:
    ratios = line_chart(
        history,
        "Dominance, EOS and diversity",
        _keys(
            "collapse", {"most_common_ratio": "most common token", "eos_ratio": "EOS", "token_diversity": "diversity"}
        ),
        span=(-0.03, 1.03),
        thresholds={"dominance": float(_setting(history, "single_token_dominance", 0.70))},
    )
    verdict = line_chart(
        history, "Verdict (1 = collapsed)", _keys("collapse", {"is_collapsed": "collapsed"}), span=(-0.05, 1.05)
    )
    unique = line_chart(
        history,
        "Unique tokens and sequences",
        _keys("collapse", {"unique_tokens": "unique tokens", "unique_sequences": "unique sequences"}),
    )
    return _section(
        "Collapse Detection",
        "The user's four rules over the generated answers, each cut at its first EOS.",
        [verdict, ratios, unique],
        [_checks(history)],
    )


def _checks(history: RunHistory) -> TableView | None:
    reasons = dict(history.texts.get("collapse/collapse_reason", []))
    if not reasons:
        return None
    tokens = dict(history.texts.get("collapse/most_common_token_text", []))
    ratios = _by_step(history, "collapse/most_common_ratio")
    verdicts = _by_step(history, "collapse/is_collapsed")
    rows = tuple(
        (step, int(verdicts.get(step, 0)), reason, tokens.get(step, ""), ratios.get(step, ""))
        for step, reason in sorted(reasons.items(), reverse=True)
    )
    columns = ("step", "collapsed", "reason", "most common token", "its share")
    return TableView(title="Checks", newest=TableRecord(step=rows[0][0], columns=columns, rows=rows))


def _by_step(history: RunHistory, key: str) -> dict[int, float]:
    series = history.series.get(key)
    return dict(zip(series.steps, series.values, strict=True)) if series else {}


def _setting(history: RunHistory, name: str, default: Any) -> Any:
    return history.run.get("settings", {}).get(name, default)


def _loss(history: RunHistory) -> Section:
    return _section(
        "Loss Analysis",
        "Per-token cross-entropy in nats on the labelled positions, without label smoothing.",
        [
            line_chart(
                history,
                "Loss (nats)",
                _keys(
                    "loss",
                    {
                        "total": "total",
                        "first_token": "first token",
                        "later_tokens": "later tokens",
                        "trainer": "trainer",
                    },
                ),
            ),
            line_chart(history, "Spread (nats)", _keys("loss", {"std": "std", "max": "max", "min": "min"})),
            line_chart(
                history,
                "First against later",
                _keys("loss", {"first_vs_later_ratio": "first / later", "high_loss_token_ratio": "high-loss share"}),
            ),
            _unless_zero(history, "Tokens with a non-finite loss", "loss/nonfinite_tokens"),
            _unless_zero(history, "Micro-batches whose own loss is not finite", "loss/trainer_nonfinite"),
        ],
        [_table(history, "loss/highest_tokens", "Highest-loss tokens")],
    )


def _tokens(history: RunHistory) -> Section:
    return _section(
        "Token Statistics",
        "What stands in the batches: real positions by the attention mask, answers as runs of labelled positions.",
        [
            line_chart(
                history,
                "Ratios",
                _keys("tokens", {"pad_ratio": "padding", "image_token_ratio": "image", "unique_token_ratio": "unique"}),
            ),
            line_chart(
                history,
                "Most common answer token's share",
                _keys("tokens", {"answer_diversity_ratio": "share of the most common id"}),
            ),
            line_chart(
                history,
                "Tokens",
                _keys(
                    "tokens",
                    {
                        "total_tokens": "positions",
                        "answer_tokens": "labelled",
                        "eos_count": "EOS",
                        "unique_tokens": "unique",
                    },
                ),
                log=True,
            ),
            line_chart(history, "Content tokens per answer", _keys("tokens", {"answer_length": "mean"})),
        ],
    )


def _gradients(history: RunHistory) -> Section:
    module_norms = {
        key: key.split("/")[1]
        for key in history.series
        if (spec := spec_of(key)) is not None and spec.key == "gradients/{module}/norm"
    }
    rates = {key: key.removeprefix("lr/") for key in history.series if key.startswith("lr/")}
    heatmaps = [
        heat_chart(f"{key.split('/')[1]}: log10 |gradient|", records, "log10 |g|")
        for key, records in sorted(history.histograms.items())
        if key.startswith("gradients/")
    ][:MAX_MODULE_HEATMAPS]
    return _section(
        "Gradient Health",
        "Before clipping, in the scale that the optimizer would see without it.",
        [
            line_chart(
                history,
                "Gradient norm",
                _keys("gradients/global", {"total_norm": "total", "avg_norm": "average"}),
                log=True,
            ),
            line_chart(history, "Norm per module", module_norms, log=True),
            line_chart(history, "Learning rate", rates),
            line_chart(
                history,
                "Zero and missing",
                _keys(
                    "gradients/global",
                    {
                        "zero_ratio": "zero share",
                        "params_without_grad": "parameters without",
                        "nonfinite": "non-finite",
                    },
                ),
            ),
            _unless_zero(history, "Parameters without all their shares", "gradients/global/params_incomplete"),
            *heatmaps,
        ],
        [_parameters(history), _table(history, "gradients/details", "Gradient details")],
    )


def _parameters(history: RunHistory) -> TableView | None:
    newest: dict[str, dict[str, float]] = {}
    step = -1
    for key, series in history.series.items():
        parts = key.split("/")
        if parts[0] == "gradients" and len(parts) == 4 and parts[3] in _GRADIENT_LEAVES:
            newest.setdefault(f"{parts[1]}/{parts[2]}", {})[parts[3]] = series.newest
            step = max(step, series.steps[-1])
    if not newest:
        return None
    ordered = sorted(newest.items(), key=lambda item: -item[1].get("norm", 0.0))
    rows = tuple((name, *(leaves.get(leaf, "") for leaf in _GRADIENT_LEAVES)) for name, leaves in ordered)
    record = TableRecord(step=step, columns=("parameter", *_GRADIENT_LEAVES), rows=rows)
    return TableView(title="Parameters, by gradient norm", newest=record)


def _data(history: RunHistory) -> Section:
    histogram = history.histograms.get("data/answer_length_histogram", [])
    bars = None
    if histogram:
        step, counts, edges = histogram[-1]
        bars = bar_chart(f"Answer lengths of the epoch, up to step {step}", edges, counts, "content tokens")
    return _section(
        "Data Quality",
        "Content tokens of every answer of the epoch so far, each counted once.",
        [
            bars,
            line_chart(
                history,
                "Answer length over the epoch",
                _keys(
                    "data",
                    {
                        "answer_length_mean": "mean",
                        "answer_length_std": "std",
                        "answer_length_min": "shortest",
                        "answer_length_max": "longest",
                    },
                ),
            ),
            line_chart(history, "Answers of one token", _keys("data", {"single_token_answers_ratio": "share"})),
            _unless_zero(history, "Micro-batches without labels, so far", "data/batches_without_labels"),
        ],
    )


def _own(history: RunHistory) -> Section | None:
    keys = [
        key
        for key in history.series
        if spec_of(key) is None and not key.startswith(("sidecar/", "train/")) and key != "epoch"
    ]
    charts = [line_chart(history, key, {key: key}) for key in keys]
    return _section("The Trainer's Own", "What the trainer itself logged.", charts) if charts else None


def _sidecar(history: RunHistory) -> Section | None:
    keys = sorted(key for key in history.series if key.startswith("sidecar/"))
    counters = [key for key in keys if (spec := spec_of(key)) is not None and spec.key in _ACCOUNTS]
    made = {"sidecar/produced": "made by the trainer", "sidecar/journal_rows": "in the run"}
    charts = [line_chart(history, "Messages", made)]
    lost = {key: key.removeprefix("sidecar/") for key in counters if any(history.series[key].values)}
    charts += [line_chart(history, "Messages lost or sent again", lost)] if lost else []
    charts += [
        line_chart(history, key.removeprefix("sidecar/"), {key: key}) for key in keys if key not in {*counters, *made}
    ]
    if not any(charts):
        return None
    return _section("Sidecar", "What Sidestep itself cost, and what it could not keep.", charts)
