"""Run the lab: `python -m benchmarks.detection [--quick] [--json FILE]`.

The quick form is the smoke: eight failures and four healthy runs of 400 steps, with bounds; its exit status says
whether they hold. The full form trains every case with several seeds in every suite; recordings are kept and found
again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.detection import plan, real_logs, repetition
from benchmarks.detection.campaign import SUITES, Campaign, Outcome
from benchmarks.detection.report import as_json, as_text, scored_runs, whole_report

from sidestep.worker.detectors.settings import PREFIX, DetectorSettings, apply_assignments

LEAST_SMOKE_RECALL_WITHIN_10 = 0.85
"""Of eight failures one may be found later."""
MOST_SMOKE_FALSE_INCIDENTS = 1
"""In 1,600 healthy steps."""


def arguments() -> argparse.ArgumentParser:
    """Return the lab's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smoke form; the exit status says whether it holds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these cases and their twins")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--splits", nargs="+", choices=plan.SPLITS, default=list(plan.SPLITS))
    parser.add_argument("--seeds", type=int, default=2, help="of each case in each of its splits (%(default)s)")
    parser.add_argument("--steps", type=int, default=plan.FULL_STEPS, help="of a run (%(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="one thread each (%(default)s)")
    parser.add_argument(
        "--set", type=_change, action="append", dest="changes_given", metavar="detectors.NAME.FIELD=VALUE", default=[]
    )
    default = Path(tempfile.gettempdir()) / "sidestep-detection-lab"
    parser.add_argument("--traces", type=Path, default=default, help="recordings, kept (%(default)s)")
    parser.add_argument("--accept-older", action="store_true", help="take recordings that older code has made")
    parser.add_argument("--no-judging", action="store_true", help="train only, and say what became of it")
    parser.add_argument("--real-logs", type=Path, default=real_logs.DEFAULT_FILE, help="skipped where it is not there")
    return parser


def _change(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith(PREFIX):
        raise argparse.ArgumentTypeError(f"{text!r} is not {PREFIX}NAME.FIELD=VALUE")
    apply_assignments(DetectorSettings(), [text])
    return name.removeprefix(PREFIX), value


def planned(options: argparse.Namespace) -> list[plan.Wanted]:
    """Return the runs that the options ask for; raises KeyError for a case that there is not."""
    if options.only:
        return plan.named(options.only, options.seeds, options.steps, options.suites)
    return plan.smoke() if options.quick else plan.full(options.seeds, options.steps, options.suites, options.splits)


def told(outcome: Outcome) -> str:
    """Return one line about a run."""
    facts = outcome.facts
    line = (
        f"{facts.suite} {facts.case} seed {facts.seed}: onset {facts.onset}, held-out loss {facts.held_out_loss:.3f}, "
        f"accuracy {facts.held_out_accuracy:.2f}, image gap {facts.image_gap:.2f}, {facts.seconds:.0f} s"
    )
    if outcome.judged is not None:
        said = [f"{each.name} ({each.level}) at {each.opened_step}" for each in outcome.judged.incidents]
        line += "; " + (", ".join(said) or "nothing said")
    return line


def run(options: argparse.Namespace, wanted: Sequence[plan.Wanted]) -> dict[str, Any]:
    """Make and judge the runs, and return the report."""
    campaign = Campaign(
        traces=options.traces,
        accept_older=options.accept_older,
        is_judging=not options.no_judging,
        num_processes=options.processes,
        changes=dict(options.changes_given),
    )
    began = time.monotonic()
    outcomes = []
    for number, outcome in enumerate(campaign.outcomes([each.job for each in wanted]), start=1):
        outcomes.append(outcome)
        print(f"[{number}/{len(wanted)}, {time.monotonic() - began:.0f} s] {told(outcome)}", flush=True)
    is_whole = not options.quick and not options.only and not options.no_judging
    logs = real_logs.judge_real_logs(options.real_logs) if is_whole else {"skipped": "the full form judges them"}
    form = "quick" if options.quick else "named" if options.only else "full"
    loops = repetition.judge_repetition() if is_whole else {"skipped": "the full form judges it"}
    extra = {"form": form, "real_logs": logs, "repetition": loops, "wall_seconds": round(time.monotonic() - began, 1)}
    return whole_report(scored_runs(wanted, outcomes), extra)


def smoke_failures(report: dict[str, Any]) -> list[str]:
    """Return which of the smoke's bounds do not hold."""
    wrong = []
    if (report["recall_within_10"] or 0.0) < LEAST_SMOKE_RECALL_WITHIN_10:
        wrong.append(f"recall within 10 steps is {report['recall_within_10']}, not {LEAST_SMOKE_RECALL_WITHIN_10}")
    if report["false_incidents"] > MOST_SMOKE_FALSE_INCIDENTS:
        wrong.append(f"{report['false_incidents']} false incidents, not {MOST_SMOKE_FALSE_INCIDENTS} at most")
    if report["not_admitted"]:
        wrong.append(f"no harm was done by {[row['case'] for row in report['not_admitted']]}: nothing was tried")
    if report["total"]["hook_failures"]:
        wrong.append(f"the hooks failed {report['total']['hook_failures']} times")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the lab; returns the exit status."""
    parser = arguments()
    options = parser.parse_args(argv)
    try:
        wanted = planned(options)
    except KeyError as error:
        parser.error(str(error.args[0]))
    report = run(options, wanted)
    if options.no_judging:
        for row in report["failures_in_detail"]:
            verdict = "admitted" if row["admitted"] else "NOT ADMITTED"
            print(f"{row['suite']} {row['case']} seed {row['seed']}: {verdict}, {row['harm']}")
    else:
        print(as_text(report))
    for file, content in ((options.json, as_json(report)), (options.markdown, as_text(report))):
        if file is not None:
            file.write_text(content + "\n", encoding="utf-8")
    wrong = smoke_failures(report) if options.quick else []
    for each in wrong:
        print(f"smoke: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
