from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from sidestep.trainer_hooks.config import HooksConfig
from sidestep.trainer_hooks.schedule import FAMILIES, Schedule


@dataclass
class TrainConfig:
    gradient_accumulation_steps: int = 4
    generation_eval_interval: int = 4 * 50
    gradient_log_interval: int = 4 * 100
    collapse_detection_interval: int = 4 * 100
    log_wandb: bool = False


def test_the_users_train_config_counts_micro_batches() -> None:
    config = HooksConfig.from_train_config(TrainConfig())
    assert (config.generation_eval_interval, config.gradient_log_interval, config.collapse_detection_interval) == (
        50,
        100,
        100,
    )
    assert config.log_wandb is False


def test_a_mapping_is_read_like_an_object_and_what_it_lacks_keeps_its_default() -> None:
    config = HooksConfig.from_train_config(
        {"generation_eval_interval": 30, "gradient_accumulation_steps": 3}, lr_interval=7
    )
    assert config.generation_eval_interval == 10
    assert config.gradient_log_interval == 100
    assert config.lr_interval == 7
    assert config.log_wandb is True


def test_an_interval_shorter_than_the_accumulation_is_every_step_and_zero_stays_never() -> None:
    cfg = {"gradient_accumulation_steps": 8, "generation_eval_interval": 2, "gradient_log_interval": 0}
    config = HooksConfig.from_train_config(cfg)
    assert config.generation_eval_interval == 1
    assert config.gradient_log_interval == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation_eval_interval", -1),
        ("lr_interval", 2.5),
        ("token_stats_interval", True),
        ("log_wandb", 1),
        ("gradient_detail", "layer"),
        ("collapse_verdict", "strict"),
        ("single_token_dominance", 1.2),
        ("excessive_eos", -0.1),
        ("max_new_tokens", 0),
        ("generation_samples", 0),
        ("high_loss_sigmas", float("nan")),
        ("close_timeout_seconds", float("inf")),
        ("eos_id", -3),
        ("ignore_index", "no"),
        ("shifted", "yes"),
    ],
)
def test_a_bad_value_raises_and_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"HooksConfig\.{field} "):
        HooksConfig(**{field: value})


@pytest.mark.parametrize(
    ("cfg", "field"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"gradient_accumulation_steps": "4"}, "gradient_accumulation_steps"),
        ({"generation_eval_interval": -5}, "generation_eval_interval"),
        ({"log_wandb": "no"}, "log_wandb"),
    ],
)
def test_a_bad_value_of_the_trainers_configuration_is_named(cfg: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        HooksConfig.from_train_config(cfg)


def test_settings_hold_every_field() -> None:
    settings = HooksConfig(eos_id=2).as_settings()
    assert settings["eos_id"] == 2
    assert HooksConfig(**settings) == HooksConfig(eos_id=2)


def test_a_family_is_due_at_step_zero_and_every_interval() -> None:
    schedule = Schedule(HooksConfig(token_stats_interval=3, generation_eval_interval=0))
    assert [step for step in range(8) if schedule.due("tokens", step)] == [0, 3, 6]
    assert not any(schedule.due("generation", step) for step in range(8))
    assert schedule.due_families(0) == tuple(name for name in FAMILIES if name != "generation")
    assert schedule.due_families(3) == ("tokens",)
    assert schedule.shortest_interval_steps("generation", "collapse") == 100
    with pytest.raises(KeyError):
        schedule.due("unknown", 0)
