"""The README's block: what it is made of, and what it is not made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.__main__ import main, write_readme
from benchmarks.page import BEGIN, END, named_file, overhead_block, with_block

FILE = "benchmarks/results/2026-01-02-cpu-2-cores.json"
README = f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n"


def step_figures(**changes: Any) -> dict[str, Any]:
    """Those of step_overhead.py, as far as the block reads them."""
    share = {"none": 0.0, "sidestep_without_generation": 0.0123, "sidestep": 0.02, "inline": 0.0456}
    return {
        "date": "2026-01-02", "hardware": "x86_64, 2 cores", "processor": "a processor", "steps_per_mode": 210,
        "share_of_step": share,
        "modes": {mode: {"thread_cpu_mean_ms": 100 * (1 + cost)} for mode, cost in share.items()},
        **changes,
    }  # fmt: skip


def whole_run(*, quick: bool = False, status: str = "measured") -> dict[str, Any]:
    return {"quick": quick, "parts": {"step_overhead": {"status": status, "figures": step_figures()}}}


def checkout(folder: Path, content: Any, *, readme: str = README) -> Path:
    """A folder with a README and results, as the repository has them."""
    (folder / "benchmarks" / "results").mkdir(parents=True)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / FILE).write_text(json.dumps(content), encoding="utf-8")
    return folder / FILE


def test_each_mode_has_a_row_in_plain_words() -> None:
    lines = overhead_block(FILE, step_figures()).splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert rows == [
        "| no hooks |  | 100.0 |",
        "| **Sidestep, without generation** | **1.23%** | 101.2 |",
        "| **Sidestep** | **2.00%** | 102.0 |",
        "| the same metrics inline | 4.56% | 104.6 |",
    ]


def test_date_hardware_steps_and_command_stand_above_the_table() -> None:
    above = overhead_block(FILE, step_figures(threads=2)).split("| --- |")[0]
    for told in ("2026-01-02", "x86_64, 2 cores", "a processor", "2 threads", "210 steps", "python -m benchmarks"):
        assert told in above


def test_a_whole_run_and_the_step_benchmark_alone_give_the_same_block() -> None:
    assert overhead_block(FILE, whole_run()) == overhead_block(FILE, step_figures())


def test_the_block_names_its_file_and_is_put_where_the_old_one_was() -> None:
    made = with_block(README, overhead_block(FILE, step_figures()))
    assert named_file(made) == FILE
    assert made.startswith(f"# Title\n\n{BEGIN}\n")
    assert made.endswith(f"{END}\n\nrest\n")
    assert "old" not in made


@pytest.mark.parametrize(
    "content",
    [
        whole_run(quick=True),
        whole_run(status="failed"),
        {"quick": False, "parts": {}},
        {"date": "2026-01-02"},
        step_figures(modes={"another": {}}),
    ],
    ids=["quick", "failed", "not run", "of something else", "of unknown modes"],
)
def test_what_holds_no_full_measurement_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="step_overhead"):
        overhead_block(FILE, content)


@pytest.mark.parametrize("file", ["results.json", "../benchmarks/results/a.json", "benchmarks/results/a.md"])
def test_a_file_that_is_no_committed_result_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match="committed"):
        overhead_block(file, step_figures())


@pytest.mark.parametrize("readme", ["no block", README + README, f"{BEGIN}\nno end\n"])
def test_a_readme_without_just_one_block_is_refused(readme: str) -> None:
    with pytest.raises(ValueError, match="block"):
        with_block(readme, overhead_block(FILE, step_figures()))
    with pytest.raises(ValueError, match="block"):
        named_file(readme)


def test_a_block_that_names_no_file_is_refused() -> None:
    with pytest.raises(ValueError, match="0 files"):
        named_file(README)


def test_writing_twice_changes_nothing_more(tmp_path: Path) -> None:
    file = checkout(tmp_path, whole_run())
    write_readme(tmp_path, file)
    once = (tmp_path / "README.md").read_text(encoding="utf-8")
    write_readme(tmp_path, file)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == once
    assert "**1.23%**" in once


def test_a_file_outside_of_the_checkout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    file = checkout(tmp_path / "elsewhere", whole_run())
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="is no JSON file of"):
        write_readme(tmp_path / "here", file)


def test_the_command_says_why_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--write-readme", str(tmp_path / "absent.json")])
    assert "is no JSON file of" in capsys.readouterr().err
