"""What holds of ``TrainerCallback`` where no Hugging Face library is installed, and of optimizers like Accelerate's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from sidestep.trainer_hooks.checks import checked_optimizer

WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # as import has it where there is none
import sidestep, sidestep.trainer_hooks.hooks
assert "TrainerCallback" in sidestep.__all__
try:
    sidestep.TrainerCallback
except ImportError as error:
    print(error)
"""


def test_the_hooks_need_no_transformers_and_the_callback_says_what_to_install() -> None:
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS]
    done = subprocess.run(command, check=False, timeout=50, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "sidestep.TrainerCallback needs transformers: pip install 'sidestep[transformers]'\n"


class WrappingOptimizer(torch.optim.Optimizer):
    """Made like Accelerate's ``AcceleratedOptimizer``: torch's class, whose init is never called."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:  # not calling super's is the point
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups


def test_hooks_go_on_the_optimizer_beneath_a_wrapper_of_the_same_class() -> None:
    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    assert checked_optimizer(WrappingOptimizer(WrappingOptimizer(inner)), model) is inner
    with pytest.raises(TypeError, match="not object"):
        checked_optimizer(object(), model)
