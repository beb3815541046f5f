"""The report: verdict first, six sections in order, nothing of a run's text unescaped, nothing fetched."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import pytest
from tests.support.report_runs import HOSTILE, full_run, make_journal, row

from sidestep.protocol.metric_names import COLLAPSE_LINE, SECTIONS
from sidestep.worker.errors import JournalError
from sidestep.worker.outbox import OutboxEntry, entry
from sidestep.worker.sinks.report import write_report


class Outline(html.parser.HTMLParser):
    """Tags, their attributes and the page's visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def outline(path: Path) -> Outline:
    made = Outline()
    made.feed(path.read_text(encoding="utf-8"))
    return made


def test_the_verdict_stands_before_the_six_sections_in_their_order(tmp_path: Path) -> None:
    page = write_report(
        make_journal(tmp_path / "journal", full_run(HOSTILE)), None, tmp_path / "out" / "report.html"
    ).read_text(encoding="utf-8")
    places = [page.index('id="verdict"')] + [page.index(f"<h2>{title}</h2>") for title in SECTIONS]
    assert places == sorted(places)
    assert "No collapse detected" in page


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    path = write_report(make_journal(tmp_path / "journal", full_run(HOSTILE)), "run-1", tmp_path / "report.html")
    made = outline(path)
    assert not [tag for tag, attributes in made.tags if any(name.startswith("on") for name in attributes)]
    assert {attributes.get("src", "data:")[:5] for tag, attributes in made.tags if tag == "img"} == {"data:"}  # type: ignore[index]
    assert any(HOSTILE in text for text in made.texts), "the text is shown as it is"
    page = path.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert "onerror=alert(2)>" not in re.sub(r"&lt;.*?&gt;|\\u003c.*?\\u003e", "", page)


def test_the_page_forbids_and_makes_no_request(tmp_path: Path) -> None:
    made = outline(write_report(make_journal(tmp_path / "journal", full_run(HOSTILE)), None, tmp_path / "report.html"))
    policy = next(
        a["content"] for t, a in made.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for tag, attributes in made.tags:
        assert tag not in {"iframe", "object", "embed", "base", "form"}
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)


def test_every_chart_has_its_figure(tmp_path: Path) -> None:
    made = outline(write_report(make_journal(tmp_path / "journal", full_run(HOSTILE)), None, tmp_path / "report.html"))
    boxes = [attributes["data-figure"] for _, attributes in made.tags if "data-figure" in attributes]
    figures = [a["id"] for tag, a in made.tags if tag == "script" and a.get("type") == "application/json"]
    assert len(boxes) >= 15
    assert boxes == figures
    assert len(set(boxes)) == len(boxes)


@pytest.mark.parametrize(
    ("last", "headline", "detail"),
    [
        ([], "No collapse check has run yet", "samples="),
        (
            [row(1, {"collapse/is_collapsed": 1, "collapse/collapse_reason": "low_diversity"})],
            "no alarm was armed",
            "",
        ),
        (
            [
                row(
                    5,
                    {
                        "collapse/is_collapsed": 1,
                        "collapse/collapse_reason": "single_token_dominance",
                        "collapse/most_common_token_text": "A",
                        "collapse/most_common_ratio": 1.0,
                    },
                ),
                entry(
                    "alert",
                    {"id": "a", "title": "t", "text": COLLAPSE_LINE.format(reason="x"), "level": "ERROR", "step": 5},
                ),
            ],
            "Model collapse detected",
            "First alarm at step 5: x.",
        ),
        (
            [entry("finish", {"exit_code": 3, "reason": "the trainer died"})],
            "The run ended in a failure",
            "the trainer died",
        ),
    ],
)
def test_the_verdict_says_what_happened(tmp_path: Path, last: list[OutboxEntry], headline: str, detail: str) -> None:
    start = [entry("run", {"run_id": "run-1"}), row(0, {"loss/total": 1.0})]
    page = write_report(make_journal(tmp_path / "journal", [*start, *last]), None, tmp_path / "report.html").read_text(
        encoding="utf-8"
    )
    assert headline in page
    assert detail in page


def test_a_second_attempt_is_a_new_line_not_a_line_back(tmp_path: Path) -> None:
    rows = [row(step, {"loss/total": 1.0}, attempt) for attempt, step in ((0, 0), (0, 25), (1, 10), (1, 20))]
    page = write_report(make_journal(tmp_path / "journal", rows), None, tmp_path / "report.html").read_text(
        encoding="utf-8"
    )
    assert '"x":[0,25,null,10,20]' in page


def test_what_is_no_journal_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="not a journal"):
        write_report(tmp_path, None, tmp_path / "report.html")
    with pytest.raises(JournalError, match="no rows of a run 'other'"):
        write_report(make_journal(tmp_path / "journal", []), "other", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
