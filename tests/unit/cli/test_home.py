from __future__ import annotations

from pathlib import Path

import pytest

from sidestep.worker.delivery import wandb_mode
from sidestep.worker.errors import ConfigError, JournalError
from sidestep.worker.home import home_folder, journal_in, latest_journal, new_run_folder, remember_latest


def test_the_home_is_where_it_is_said_to_be() -> None:
    assert home_folder({"SIDESTEP_HOME": "/a", "XDG_STATE_HOME": "/b"}) == Path("/a")
    assert home_folder({"XDG_STATE_HOME": "/b"}) == Path("/b/sidestep")
    assert home_folder({}) == Path.home() / ".local" / "state" / "sidestep"


def test_new_runs_have_folders_of_their_own() -> None:
    assert len({new_run_folder(Path("/a")) for _ in range(20)}) == 20


def test_the_latest_journal_is_remembered(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with pytest.raises(JournalError, match="no run is known"):
        latest_journal(home)
    for name in ("one", "two"):
        remember_latest(home, tmp_path / name)
    assert latest_journal(home) == tmp_path / "two"
    assert [path.name for path in home.iterdir()] == ["latest"]


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="SIDESTEP_HOME"):
        remember_latest(tmp_path / "file" / "home", tmp_path)


def test_a_journal_is_found_in_its_folder_or_beside_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "out" / "journal").mkdir(parents=True)
    with pytest.raises(JournalError, match="is not a journal"):
        journal_in(tmp_path / "out")
    (tmp_path / "out" / "journal" / "index.sqlite").write_text("")
    assert journal_in(tmp_path / "out") == journal_in(tmp_path / "out" / "journal") == tmp_path / "out" / "journal"


def test_wandb_is_online_only_where_a_key_is(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    assert wandb_mode("", {"NETRC": str(netrc)}) == "offline"
    netrc.write_text("machine other.example login u password p\n")
    assert wandb_mode("", {"NETRC": str(netrc)}) == "offline"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password key\n")
    assert wandb_mode("", {"NETRC": str(netrc)}) == "online"
    assert wandb_mode("", {"NETRC": "/none", "WANDB_API_KEY": "k"}) == "online"
    assert wandb_mode("", {"NETRC": str(netrc), "WANDB_MODE": "dryrun"}) == "offline"
    assert wandb_mode("disabled", {"WANDB_MODE": "online"}) == "disabled"
    with pytest.raises(ConfigError, match=r"wandb_mode: 'perhaps' \(from WANDB_MODE\)"):
        wandb_mode("", {"WANDB_MODE": "perhaps"})
