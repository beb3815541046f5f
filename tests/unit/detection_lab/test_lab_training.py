"""Short trainings for real: recordings that a worker's code judges, ranks among them, and the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.detection.campaign import Campaign, folder_of, make
from benchmarks.detection.facts import Job, read_facts, write_facts
from benchmarks.detection.judge import assembled_steps, judge
from benchmarks.detection.recording import FRAMES_FILE, read_messages

from sidestep.protocol.messages import Goodbye, Hello, Kind, Signals

BROKEN = Job(case="weight_is_nan", suite="digits", seed=1, num_steps=40)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


def test_a_weight_that_becomes_nan_is_trained_recorded_and_found(traces: Path) -> None:
    outcome = Campaign(traces=traces, num_processes=1).outcome(BROKEN)
    facts, judged = outcome.facts, outcome.judged
    assert judged is not None
    assert judged.num_steps == 40
    assert 18 <= facts.onset < 26
    assert not facts.held_out_loss < 100
    assert not facts.hook_failures
    assert 0 < facts.hook_seconds < facts.seconds
    found = {name: step for each in judged.incidents for name, step in each.detectors.items()}
    assert facts.onset <= found["nonfinite"] <= facts.onset + 2
    told = [step for each in judged.incidents for step, level in each.told if level == "critical"]
    assert any(facts.onset <= step <= facts.onset + 2 for step in told)


def test_a_recording_is_found_again_unless_other_code_made_it(traces: Path) -> None:
    job = Job(case="mix", suite="scenes", seed=1, num_steps=6)
    facts = make(job, traces, accept_older=False)
    folder = folder_of(traces, job)
    frames = (folder / FRAMES_FILE).read_bytes()
    assert make(job, traces, accept_older=False) == facts
    assert (folder / FRAMES_FILE).read_bytes() == frames
    write_facts(folder, replace(facts, digest="older", held_out_accuracy=-1.0))
    assert make(job, traces, accept_older=True).held_out_accuracy == -1.0
    again = make(job, traces, accept_older=False)
    assert again.held_out_loss == facts.held_out_loss  # the same run, bit for bit
    assert again.losses == facts.losses
    (folder / "facts.json").unlink()
    assert read_facts(folder) is None


def test_a_judgement_is_the_same_every_time_and_thresholds_change_it(traces: Path) -> None:
    make(BROKEN, traces, accept_older=False)
    path = folder_of(traces, BROKEN) / FRAMES_FILE
    assert judge(path).incidents == judge(path).incidents
    changed = judge(path, {"nonfinite.enabled": "false"})
    assert "nonfinite" not in {name for each in changed.incidents for name in each.detectors}


def test_replicas_become_the_ranks_of_one_run(traces: Path) -> None:
    job = Job(case="ranks_share_samples", suite="digits", seed=1, num_steps=12)
    make(job, traces, accept_older=False)
    path = folder_of(traces, job) / FRAMES_FILE
    messages = list(read_messages(path))
    hellos = {each.envelope.rank: each.message for each in messages if isinstance(each.message, Hello)}
    assert sorted(hellos) == [0, 1]
    assert {hello.world_size for hello in hellos.values()} == {2}
    assert sum(isinstance(each.message, Goodbye) for each in messages) == 2
    assert len({each.envelope.incarnation for each in messages}) == 1
    steps = [step for step, _ in assembled_steps(path)]
    onset = make(job, traces, accept_older=True).onset
    assert [step.step for step in steps] == list(range(12))
    for step in steps:
        sent = {part.rank: part.message for part in step.parts[Kind.SIGNALS]}
        first, second = sent[0], sent[1]
        assert isinstance(first, Signals)
        assert isinstance(second, Signals)
        assert first.heartbeat.tobytes() == second.heartbeat.tobytes()  # gradients are averaged
        is_shared = first.sample_hashes.tolist() == second.sample_hashes.tolist()
        assert is_shared == (step.step >= onset)
