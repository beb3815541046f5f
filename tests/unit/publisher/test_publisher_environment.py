"""What a run says about where it ran, and the choice of W&B's mode."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from sidestep.protocol import frames
from sidestep.protocol.frames import Envelope
from sidestep.protocol.messages import Hello
from sidestep.trainer_hooks import environment
from sidestep.trainer_hooks.launcher import state_home, wandb_mode
from sidestep.trainer_hooks.plain import plain_map


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "feature/x")
    (folder / "deep").mkdir()
    (folder / "deep" / "train.py").write_text("")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def test_the_commit_is_read_as_git_says_it(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    expected = {"git_commit": commit, "git_branch": "feature/x"}
    assert environment.git_commit(checkout / "deep") == expected
    git(checkout, "pack-refs", "--all")
    assert environment.git_commit(checkout) == expected
    git(checkout, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    assert environment.git_commit(tmp_path / "tree") == {"git_commit": commit, "git_branch": "other"}
    git(checkout, "checkout", "-q", "--detach")
    assert environment.git_commit(checkout) == {"git_commit": commit}


def test_an_odd_git_folder_is_no_reason_to_fail(tmp_path: Path) -> None:
    assert environment.git_commit(tmp_path) == {}
    (tmp_path / ".git").mkdir()
    assert environment.git_commit(tmp_path) == {}
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff\xfe\x00")
    assert environment.git_commit(tmp_path) == {}
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/unborn\n")
    assert environment.git_commit(tmp_path) == {"git_branch": "unborn"}


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        (["--api-key", "SECRET"], ["--api-key", "***"]),
        (["--wandb_token=SECRET"], ["--wandb_token=***"]),
        (["WANDB_API_KEY=SECRET"], ["WANDB_API_KEY=***"]),
        (["--hf-token", "--next"], ["--hf-token", "--next"]),
        (["https://me:SECRET@host/x"], ["https://***@host/x"]),
        (["--tokenizer=gpt2", "--max_tokens", "4"], ["--tokenizer=gpt2", "--max_tokens", "***"]),
        (["--lr=1e-3", "x" * 5_000], ["--lr=1e-3", "x" * 1_024]),
    ],
)
def test_secrets_on_the_command_line_are_hidden(argument: list[str], shown: list[str]) -> None:
    assert environment.command_line(argument) == shown


def test_what_the_environment_keeps_secret_travels_under_no_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "SECRET-FROM-THE-ENVIRONMENT")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a-value-that-is-no-secret")
    config = {"logger": {"login": "SECRET-FROM-THE-ENVIRONMENT"}, "note": "run by SECRET-FROM-THE-ENVIRONMENT now"}
    config |= {"path": Path("/x/SECRET-FROM-THE-ENVIRONMENT"), "list": ["a-value-that-is-no-secret"]}  # type: ignore[dict-item]
    made = plain_map(config)
    assert made["logger"] == {"login": "***"}
    assert (made["note"], made["path"]) == ("run by *** now", "/x/***")
    assert made["list"] == ["a-value-that-is-no-secret"]
    shown = environment.command_line(["train.py", "--wandb-login", "SECRET-FROM-THE-ENVIRONMENT"])
    assert shown == ["train.py", "--wandb-login", "***"]


def test_the_snapshot_travels_and_holds_no_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "SECRET-FROM-THE-ENVIRONMENT")
    known = environment.snapshot(torch.device("cpu"))
    assert {"host", "pid", "command_line", "python", "torch", "device", "started_at"} <= set(known)
    assert "CPU" in known["device"]
    identity = Envelope(run_id="r", incarnation="i", rank=0)
    frame = frames.encode(identity, Hello(environment=known))
    assert b"SECRET-FROM-THE-ENVIRONMENT" not in frame
    message = frames.decode(frame)[1]
    assert isinstance(message, Hello)
    assert message.environment["torch"] == str(torch.__version__)


@pytest.mark.parametrize(
    ("variables", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "x"}, "", "online"),
        ({"WANDB_API_KEY": " "}, "", "offline"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "x"}, "", "offline"),
        ({"WANDB_MODE": "online"}, "", "online"),
        ({}, "machine api.wandb.ai\n  login user\n  password x\n", "online"),
        ({}, "machine elsewhere login user password x\n", "offline"),
        ({"WANDB_BASE_URL": "https://wandb.corp.example:8443"}, "machine api.wandb.ai password x\n", "offline"),
        ({"WANDB_BASE_URL": "https://wandb.corp.example:8443"}, "machine wandb.corp.example password x\n", "online"),
        ({"NETRC": "/nonexistent/netrc"}, "machine api.wandb.ai password x\n", "offline"),
    ],
)
def test_the_mode_needs_no_question(tmp_path: Path, variables: dict[str, str], netrc: str, mode: str) -> None:
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
    assert wandb_mode(variables, home=tmp_path) == mode


def test_the_state_folder_follows_its_variables(tmp_path: Path) -> None:
    assert state_home({"SIDESTEP_HOME": "/a", "XDG_STATE_HOME": "/b"}) == Path("/a")
    assert state_home({"XDG_STATE_HOME": "/b"}) == Path("/b/sidestep")
    assert state_home({}) == Path.home() / ".local" / "state" / "sidestep"
