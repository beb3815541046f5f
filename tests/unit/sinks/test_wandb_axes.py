from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import combinations

from sidestep.protocol.metric_names import FAMILIES, METRICS
from sidestep.worker.sinks.wandb_axes import Axes


def named(*rows: Mapping[str, object]) -> dict[str, str | None]:
    axes = Axes()
    return {name: axis for row in rows for name, axis in axes.unnamed(row)}


def test_a_family_is_one_glob() -> None:
    names = named({"loss/total": 1.0, "loss/std": 1.0, "train/step": 1}, {"loss/max": 2.0, "train/step": 2})
    assert names == {"loss/*": "train/step", "train/step": None}


def test_an_epochs_values_have_the_epoch_as_their_axis() -> None:
    row = {"data/answer_length_mean": 1.0, "data/answer_length_mean_epoch_3": 1.0, "epoch": 3, "train/step": 9}
    assert named(row) == {
        "data/answer_length_mean": "epoch",
        "data/answer_length_mean_epoch_*": "train/step",
        "epoch": None,
        "train/step": None,
    }


def test_the_trainers_own_axis_is_used_where_no_family_has_the_key() -> None:
    row = {"val/accuracy": 0.5, "loss/val": 1.0, "val/epoch": 2, "train/step": 9}
    names = named({**row, "_axes": {"val/accuracy": "val/epoch", "loss/val": "val/epoch"}})
    assert names == {"val/accuracy": "val/epoch", "loss/*": "train/step", "val/epoch": None, "train/step": None}


def test_every_metric_has_exactly_one_rule() -> None:
    keys = [
        spec.key.replace("{epoch}", "3").replace("{module}", "vision").replace("{param}", "weight").replace("{", "x{")
        for spec in METRICS
    ]
    names = named({**dict.fromkeys(keys, 1.0), "val_loss": 1.0, "epoch": 3, "train/step": 1, "train/attempt": 0})
    for key in [*keys, "val_loss", "train/attempt"]:
        rules = [name for name in names if fnmatchcase(key, name)]
        assert len(rules) == 1, (key, rules)
    assert len(FAMILIES) <= len(names) < 45
    for first, second in combinations(names, 2):
        assert not fnmatchcase(first, second), (first, second)
        assert not fnmatchcase(second, first), (first, second)


def test_a_star_in_a_key_makes_no_rule() -> None:
    assert named({"a*": 1.0, "*": 2.0, "_timestamp": 1.0, "train/step": 1}) == {"train/step": None}
