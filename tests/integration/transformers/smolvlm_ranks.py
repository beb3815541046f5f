"""One rank of ``Trainer`` under DistributedDataParallel; writes what it saw as JSON.

torchrun --nproc_per_node 2 tests/integration/transformers/smolvlm_ranks.py DIR [--without]
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tests.support.rank_processes import say_where_it_hangs

import sidestep
from sidestep.protocol.messages import Generation, Gradients, Losses, Scalars, StepEnd
from sidestep.trainer_hooks.transport import InProcessTransport

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("smolvlm_trainer.py"))
if spec is None or spec.loader is None:
    raise ImportError("smolvlm_trainer.py does not stand beside this file")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

NUM_STEPS = 4
CONFIG = sidestep.HooksConfig(
    token_stats_interval=1, loss_breakdown_interval=1, lr_interval=1, gradient_log_interval=1, answer_length_interval=1,
    generation_eval_interval=2, collapse_detection_interval=2, max_new_tokens=4,
)  # fmt: skip


class Recording(transformers.Trainer):  # type: ignore[misc]  # its types are not read
    """Keeps the norms before clipping, after the ranks' gradients are averaged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms: list[float] = []

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.norms.append(float(norm))
        return norm


def main() -> None:
    torch.set_num_threads(1)
    say_where_it_hangs(120)
    out, opened = Path(sys.argv[1]), list[InProcessTransport]()

    def way(*arguments: Any) -> InProcessTransport:
        opened.append(InProcessTransport(*arguments))
        return opened[-1]

    callback = sidestep.TrainerCallback(config=CONFIG, transport=way, samples=tiny.samples())
    trainer = Recording(
        model=tiny.model(),
        args=tiny.arguments(out / "checkpoints", max_steps=NUM_STEPS, logging_steps=1, ddp_backend="gloo"),
        train_dataset=tiny.rows(32),
        data_collator=tiny.collate,
        processing_class=tiny.tokenizer(),
        callbacks=[] if "--without" in sys.argv else [callback],
    )
    trainer.train()
    callback.close()
    messages = opened[0].messages if opened else []
    weights = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
    seen = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "weights": hashlib.sha256(weights).hexdigest(),
        "failures": callback.failures(),
        "run_id": opened[0].identity.run_id if opened else "",
        "norms": trainer.norms,
        "norms_sent": [norm(m) for m in messages if isinstance(m, Gradients) and not m.clipped],
        "steps": [m.step for m in messages if isinstance(m, StepEnd)],
        "losses": [(m.step, float(m.trainer_loss[0])) for m in messages if isinstance(m, Losses)],
        "reported": [m.values["train/loss"] for m in messages if isinstance(m, Scalars) and "train/loss" in m.values],
        "generations": sum(isinstance(m, Generation) for m in messages),
    }
    (out / f"rank{trainer.args.process_index}.json").write_text(json.dumps(seen), encoding="utf-8")
    torch.distributed.barrier()  # no rank leaves while another one still talks to it
    torch.distributed.destroy_process_group()


def norm(message: Gradients) -> float:
    scale = 4.0 ** message.exponents.astype(np.float64)
    return float(np.sqrt((scale * (message.m2 + message.counts * message.means**2)).sum()))


if __name__ == "__main__":
    main()
