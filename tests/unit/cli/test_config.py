from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sidestep.worker.config import WorkerConfig, environment_name, flag_name, load_config
from sidestep.worker.errors import ConfigError


def toml(folder: Path, text: str) -> Path:
    file = folder / "worker.toml"
    file.write_text(text)
    return file


def test_the_command_line_goes_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = toml(tmp_path, 'project = "file"\nentity = "file"\ncommit_messages = 5\n')
    config = load_config(
        {"project": "line", "entity": None},
        environment={"SIDESTEP_PROJECT": "variable", "SIDESTEP_ENTITY": "variable"},
        file=file,
    )
    assert (config.project, config.entity, config.commit_messages) == ("line", "variable", 5)
    assert config.assembly_deadline_seconds == 30.0


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = toml(tmp_path, 'until_idle = true\nout = "somewhere"\n')
    config = load_config(environment={"SIDESTEP_CONFIG": str(file)})
    assert config.until_idle is True
    assert config.out == Path.cwd() / "somewhere"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assembly_deadline_seconds", "soon"),
        ("assembly_deadline_seconds", "-1"),
        ("assembly_deadline_seconds", "nan"),
        ("commit_messages", "0"),
        ("commit_messages", "1.5"),
        ("segment_bytes", "10"),
        ("wandb_mode", "maybe"),
        ("until_idle", "perhaps"),
    ],
)
def test_a_bad_value_is_named_with_its_source(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as on_the_line:
        load_config({name: value}, environment={})
    assert str(on_the_line.value).startswith(f"{name}: {value!r} (from the command line's {flag_name(name)}) is not")
    with pytest.raises(ConfigError) as in_a_variable:
        load_config(environment={environment_name(name): value})
    assert f"(from the environment variable {environment_name(name)})" in str(in_a_variable.value)


def test_a_bad_value_of_the_file_is_named_with_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, 'commit_messages = "many"\n')
    with pytest.raises(
        ConfigError, match=r"commit_messages: 'many' \(from the file .*worker\.toml\) is not a whole number"
    ):
        load_config(environment={}, file=file)


def test_an_unknown_option_of_the_file_is_named(tmp_path: Path) -> None:
    file = toml(tmp_path, "comit_messages = 3\n")
    with pytest.raises(ConfigError, match=r"comit_messages: no such option \(from the file .*worker\.toml\)"):
        load_config(environment={}, file=file)


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config: .*none\.toml.* \(from SIDESTEP_CONFIG\) cannot be read"):
        load_config(environment={"SIDESTEP_CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match=r"config: .*worker\.toml.* \(from --config\) is not TOML"):
        load_config(environment={}, file=toml(tmp_path, "= ="))


def test_every_option_has_a_help_text_and_a_default_that_passes_its_own_check() -> None:
    for option in fields(WorkerConfig):
        assert option.metadata["help"]
        value = getattr(WorkerConfig(), option.name)
        if value is not None:
            assert option.metadata["convert"](value) == value


def test_the_options_are_these_and_no_others() -> None:
    """The names are a contract: a script that uses one goes on working."""
    assert [option.name for option in fields(WorkerConfig)] == [
        "endpoint", "keys", "journal", "out", "project", "entity", "wandb_mode", "assembly_deadline_seconds",
        "commit_interval_seconds", "commit_messages", "segment_bytes", "journal_max_bytes", "journal_on_network_fs",
        "feed_bytes", "sink_drain_seconds", "trainer_silence_seconds", "idle_exit_seconds", "owner_pid", "until_idle",
        "detector", "health_port", "health_host",
    ]  # fmt: skip
