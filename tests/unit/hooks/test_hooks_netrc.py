from __future__ import annotations

from pathlib import Path

from sidestep.trainer_hooks.console import Console
from sidestep.trainer_hooks.launcher import wandb_mode


def test_a_netrc_that_cannot_be_read_is_said_once_and_holds_no_key(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_bytes(b"machine api.wandb.ai password \xff\xfe")
    (tmp_path / "_netrc").mkdir()
    said: list[str] = []
    console = Console(said.append)
    for _ in range(2):
        assert wandb_mode({}, home=tmp_path, console=console) == "offline"
    assert [line.partition(" cannot be read")[0] for line in said] == [
        f"sidestep: {tmp_path / '.netrc'}",
        f"sidestep: {tmp_path / '_netrc'}",
    ]
    assert all(line.endswith("no W&B key is taken from it.\n") for line in said)


def test_one_that_is_not_there_is_nothing_to_speak_of(tmp_path: Path) -> None:
    said: list[str] = []
    assert wandb_mode({}, home=tmp_path, console=Console(said.append)) == "offline"
    assert said == []
