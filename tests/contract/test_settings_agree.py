"""The worker reads the trainer's configuration by the same names, defaults and families."""

from __future__ import annotations

from dataclasses import fields

from sidestep.protocol.metric_names import FAMILIES
from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.schedule import FAMILIES as SCHEDULED
from sidestep.worker.settings import RunSettings


def test_every_setting_of_the_worker_is_a_field_of_the_trainer_with_its_default() -> None:
    trainers = HooksConfig().as_settings()
    defaults = RunSettings()
    assert {field.name: getattr(defaults, field.name) for field in fields(RunSettings)} == {
        field.name: trainers[field.name] for field in fields(RunSettings)
    }


def test_what_the_trainer_sends_is_what_the_worker_reads() -> None:
    sent = HooksConfig(collapse_verdict="target_relative", single_token_dominance=0.5, generation_eval_interval=7)
    read = RunSettings.from_map(sent.as_settings())
    assert all(getattr(read, field.name) == getattr(sent, field.name) for field in fields(RunSettings))


def test_each_family_has_an_interval_in_the_configuration() -> None:
    names = {field.name for field in fields(HooksConfig)}
    assert set(FAMILIES.values()) <= names
    assert len(SCHEDULED) == len(FAMILIES)
