"""The suite: which parts run, which do not and why, and what becomes of one that fails."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from benchmarks import suite
from benchmarks.__main__ import main
from benchmarks.suite import Part, run_parts, run_script, select
from benchmarks.surroundings import Surroundings, commit_of
from benchmarks.table import TABLES

WRITES_FIGURES = """
import json, pathlib, sys
place = sys.argv.index("--json") + 1
pathlib.Path(sys.argv[place]).write_text(json.dumps({"given": sys.argv[1:place - 1], "command": "its own"}))
"""
FAILS = "print('a line'); raise SystemExit('no such luck')"
HANGS = """
import os, time
child = os.fork()
if child:
    with open(os.path.join(os.path.dirname(__file__), "child"), "w") as file:
        file.write(str(child))
time.sleep(600)
"""


def machine(*, quick: bool = False, cores: int = 2, device: str = "", device_bytes: int = 0) -> Surroundings:
    return Surroundings(
        quick=quick, hardware=f"x86_64, {cores} cores", processor="a processor", cores=cores, usable_cores=cores,
        python="3.11", load_before=0.0, device=device, device_bytes=device_bytes,
    )  # fmt: skip


def script(folder: Path, name: str, text: str) -> str:
    file = folder / "benchmarks" / f"{name}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return str(file)


def part(name: str) -> Part:
    return next(part for part in suite.PARTS if part.name == name)


@pytest.mark.parametrize("each", suite.PARTS, ids=lambda each: each.name)
def test_every_part_is_a_script_with_a_quick_form_and_a_table(each: Part) -> None:
    text = (suite.ROOT / each.command(quick=False)[0]).read_text(encoding="utf-8")
    for option in ("--quick", "--json", *(given for given in (*each.full, *each.quick) if given.startswith("--"))):
        assert f'"{option}"' in text
    assert each.name in TABLES


def test_chosen_parts_run_in_the_order_of_the_suite() -> None:
    assert [part.name for part in select(["ranks", "kernels"])] == ["kernels", "ranks"]
    assert select(None) == suite.PARTS


def test_an_unknown_part_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no such part: rank; there are step_overhead,.* ranks"):
        select(["rank"])


def test_the_quick_form_says_so_to_the_script() -> None:
    assert part("ranks").command(quick=True) == ["benchmarks/ranks.py", "--quick", "--ranks", "128"]
    assert part("ranks").command(quick=False) == ["benchmarks/ranks.py"]


def test_the_large_model_needs_a_large_device_but_for_its_quick_form() -> None:
    large = part("large_model_step")
    assert "no CUDA device" in large.reason_to_skip(machine())
    assert "24 GiB are there" in large.reason_to_skip(machine(device="a device", device_bytes=24 << 30))
    assert not large.reason_to_skip(machine(device="a device", device_bytes=80 << 30))
    assert not large.reason_to_skip(machine(quick=True))
    assert "2 layers of a small width" in large.note(machine(quick=True))


def test_what_is_left_out_without_a_device_is_said() -> None:
    assert "no logits" in part("kernels").note(machine())
    assert not part("kernels").note(machine(device="a device"))


def test_the_throughput_of_a_worker_needs_two_cores() -> None:
    assert "two cores" in part("worker_throughput").reason_to_skip(machine(cores=1))
    assert not part("worker_throughput").reason_to_skip(machine(cores=2))


def test_nanovlm_needs_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIDESTEP_NANOVLM", raising=False)
    assert "no checkout" in part("nanovlm_step").reason_to_skip(machine())


def test_a_part_without_its_packages_is_skipped_and_starts_nothing() -> None:
    absent = Part(name="absent", question="?", needs=("json", "no_such_package"))
    said: list[str] = []
    outcomes = run_parts([absent], machine(), said.append)
    assert outcomes == {"absent": {"status": "skipped", "reason": "not installed: no_such_package"}}
    assert said == ["absent: skipped: not installed: no_such_package"]


def test_a_script_gives_its_figures(tmp_path: Path) -> None:
    command = [script(tmp_path, "good", WRITES_FIGURES), "--quick"]
    outcome = run_script(command, limit_seconds=30)
    assert outcome["status"] == "measured"
    assert outcome["figures"]["given"] == ["--quick"]
    assert outcome["figures"]["command"] == outcome["command"] == " ".join(["python", *command])


@pytest.mark.parametrize(
    ("text", "reason"),
    [(FAILS, "no such luck"), ("raise SystemExit(3)", "exit status 3, and not a word"), ("print('done')", "done")],
    ids=["says why", "says nothing", "writes no figures"],
)
def test_a_script_that_fails_is_known_by_its_last_line(tmp_path: Path, text: str, reason: str) -> None:
    outcome = run_script([script(tmp_path, "bad", text)], limit_seconds=30)
    assert (outcome["status"], outcome["reason"]) == ("failed", reason)
    assert "figures" not in outcome


def test_a_script_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    outcome = run_script([script(tmp_path, "hangs", HANGS)], limit_seconds=5)
    assert (outcome["status"], outcome["reason"]) == ("failed", "not done after 5 s")
    child = int((tmp_path / "benchmarks" / "child").read_text(encoding="utf-8"))
    for _ in range(200):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # who was its parent is gone, and who takes it over may be slow to ask for it


def test_after_a_failure_the_rest_goes_on_and_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    script(tmp_path, "detector_cost", FAILS)
    figures = {"runs": [], "goal_ms": 2.0}
    script(tmp_path, "kernels", WRITES_FIGURES.replace('"command": "its own"', f"**{figures!r}"))
    told, page = tmp_path / "all.json", tmp_path / "page.md"
    options = ["--quick", "--only", "detector_cost", "kernels", "--json", str(told), "--markdown", str(page)]
    assert main(options) == 1
    result = json.loads(told.read_text(encoding="utf-8"))
    assert {name: outcome["status"] for name, outcome in result["parts"].items()} == {
        "kernels": "measured",
        "detector_cost": "failed",
    }
    assert result["command"] == "python -m benchmarks --quick --only detector_cost kernels"
    text = page.read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert "**Failed**: `no such luck`" in text
    assert main(["--quick", "--only", "kernels"]) == 0


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("", "cpu-2-cores"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("Tesla T4", "tesla-t4"),
    ],
)
def test_files_are_named_by_the_hardware(device: str, name: str) -> None:
    assert machine(device=device).name() == name


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert not commit_of(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "file").write_text("one", encoding="utf-8")
    for told in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *told], check=True)
    clean = commit_of(tmp_path)
    assert len(clean) >= 7
    (tmp_path / "file").write_text("two", encoding="utf-8")
    assert commit_of(tmp_path) == f"{clean}+"
