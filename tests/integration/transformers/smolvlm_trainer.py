"""Trains a tiny random SmolVLM with Hugging Face's own ``Trainer``, and records every raw tensor beside it.

    python tests/integration/transformers/smolvlm_trainer.py --out DIR [--without] [--restart-at STEP] [--steps N]

What is recorded is what a reader of docs/metrics.md needs to compute every metric again (tests/support/reference.py).
Nothing is downloaded: weights, images and tokenizer are made here.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

import sidestep

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
SPECIAL_WORDS = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "image": "<image>"}
WORDS = [
    *SPECIAL_WORDS.values(),
    "what", "is", "the", "colour", "of", "this", "picture", "it", "very", "red", "green", "blue",
]  # fmt: skip
NUM_IMAGE_TOKENS = 4
BATCH_SIZE, ACCUMULATION, NUM_ROWS = 2, 2, 96
STEPS_PER_EPOCH = NUM_ROWS // (BATCH_SIZE * ACCUMULATION)
BATCH_INTERVAL, GRADIENT_INTERVAL, GENERATION_INTERVAL = 5, 10, 20
MAX_NEW_TOKENS = 5
MODULES = {
    "model.vision_model": "vision_model",
    "model.connector": "connector",
    "model.text_model": "text_model",
    "lm_head": "lm_head",
}

Row = dict[str, torch.Tensor]


def tokenizer() -> Any:
    """Words as ids, as a fast tokenizer."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=SPECIAL_WORDS["pad"]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": word for name, word in SPECIAL_WORDS.items() if name != "image"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=[SPECIAL_WORDS["image"]], **special
    )


def model(seed: int = 0, **more: Any) -> Any:
    """A SmolVLM of some ten thousand parameters, with random weights."""
    torch.manual_seed(seed)
    text = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        attention_dropout=0.1,
    )  # fmt: skip
    vision = SmolVLMVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = transformers.SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2, tie_word_embeddings=False,
        pad_token_id=PAD, **more,
    )  # fmt: skip
    return transformers.SmolVLMForConditionalGeneration(config)


def rows(num_rows: int, seed: int = 1) -> list[Row]:
    """Questions about the colour of a picture; answers of one to three words."""
    generator = torch.Generator().manual_seed(seed)
    words = {word: i for i, word in enumerate(WORDS)}
    made = []
    for _ in range(num_rows):
        colour, length, short = (int(i) for i in torch.randint(0, 3, (3,), generator=generator))
        picture = torch.rand(1, 3, 16, 16, generator=generator) * 0.3
        picture[0, colour] += 0.7
        name = ("red", "green", "blue")[colour]
        question = "what is the colour of this picture" if short else "what is the colour"
        prompt = [BOS, *[IMAGE] * NUM_IMAGE_TOKENS, *(words[word] for word in question.split())]
        answer = [words[word] for word in (name, f"very {name}", f"it is {name}")[length].split()] + [EOS]
        made.append({
            "input_ids": torch.tensor(prompt + answer),
            "labels": torch.tensor([-100] * len(prompt) + answer),
            "pixel_values": picture,
        })  # fmt: skip
    return made


def collate(batch: list[Row]) -> Row:
    """Rows as one batch, padded on the right."""
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.stack([
            torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=fill) for row in batch
        ])  # fmt: skip

    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    return {
        "input_ids": padded("input_ids", PAD),
        "labels": padded("labels", -100),
        "attention_mask": (torch.arange(longest)[None] < lengths).long(),
        "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
    }


def samples(num_samples: int = 4) -> list[sidestep.Sample]:
    """Prompts of held-out rows, each with its picture."""
    words, made = tokenizer(), []
    for row in rows(num_samples, seed=2):
        start = int((row["labels"] != -100).nonzero()[0])
        answer = row["input_ids"][start:]
        made.append(
            sidestep.Sample(
                question=words.decode(row["input_ids"][1 + NUM_IMAGE_TOKENS : start]),
                target=words.decode(answer, skip_special_tokens=True),
                image=row["pixel_values"][0],
                prompt_ids=row["input_ids"][:start],
                target_ids=answer,
                inputs={"pixel_values": row["pixel_values"][None]},
            )
        )
    return made


def arguments(folder: Path, **more: Any) -> Any:
    """What every training here has in common."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "max_grad_norm": 0.5,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return transformers.TrainingArguments(**(given | more))


def hooks_config() -> sidestep.HooksConfig:
    """Intervals that make every family due several times in sixty steps."""
    return sidestep.HooksConfig(
        token_stats_interval=BATCH_INTERVAL,
        loss_breakdown_interval=BATCH_INTERVAL,
        lr_interval=BATCH_INTERVAL,
        answer_length_interval=BATCH_INTERVAL,
        gradient_log_interval=GRADIENT_INTERVAL,
        generation_eval_interval=GENERATION_INTERVAL,
        collapse_detection_interval=GENERATION_INTERVAL,
        max_new_tokens=MAX_NEW_TOKENS,
    )


class RecordingTrainer(transformers.Trainer):  # type: ignore[misc]  # its types are not read
    """The library's trainer, which also keeps what passes through it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arrays: dict[str, NDArray[Any]] = {}
        self._microsteps: dict[int, int] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        kept = {name: value.clone() for name, value in inputs.items() if value.dim() == 2}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            step = self.state.global_step + 1
            microstep = self._microsteps.get(step, 0)
            self._microsteps[step] = microstep + 1
            place = f"batch/{step}/{microstep}"
            self.arrays[f"{place}/labels"] = kept["labels"].numpy()
            self.arrays[f"loss/{step}/{microstep}"] = loss.detach().numpy().copy()
            if step % BATCH_INTERVAL == 0:
                self.arrays[f"{place}/input_ids"] = kept["input_ids"].numpy()
                self.arrays[f"{place}/mask"] = kept["attention_mask"].numpy()
                self.arrays[f"{place}/logits"] = outputs.logits.detach().float().numpy().copy()
                self.arrays[f"{place}/loss"] = loss.detach().numpy().copy()
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        step = self.state.global_step + 1
        if step % GRADIENT_INTERVAL == 0:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    self.arrays[f"gradient/{step}/{name}"] = parameter.grad.numpy().copy()
        return super()._clip_grad_norm(model)


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]  # its types are not read
    """Rates before the optimizer's step, generations after it, and a stop where it is told."""

    def __init__(self, stop_at: int) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        self._stop_at = stop_at

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        self.arrays[f"lr/{state.global_step + 1}"] = np.array([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        step = state.global_step
        if step % GENERATION_INTERVAL == 0:
            model.eval()
            for number, sample in enumerate(samples()):
                prompt = torch.as_tensor(sample.prompt_ids)[None]
                made = model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                    pixel_values=sample.inputs["pixel_values"], max_new_tokens=MAX_NEW_TOKENS,
                )  # fmt: skip
                self.arrays[f"generated/{step}/{number}"] = made[0, prompt.shape[1] :].numpy().copy()
            model.train()
        if step == self._stop_at:
            control.should_training_stop = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--without", action="store_true", help="the library's trainer alone, and nothing recorded")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--restart-at", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = arguments(
        options.out / "checkpoints", max_steps=options.steps, eval_strategy="steps", eval_steps=20,
        save_strategy="steps", save_steps=30,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "model": model(seed=5 if options.resume else 0),  # what is resumed comes from the checkpoint alone
        "args": given,
        "train_dataset": rows(NUM_ROWS),
        "eval_dataset": rows(4, seed=3),
        "data_collator": collate,
        "processing_class": tokenizer(),
    }
    if options.without:
        trainer = transformers.Trainer(**parts)
        trainer.train()
    else:
        recorder = Recorder(0 if options.resume else options.restart_at)
        callback = sidestep.TrainerCallback(samples=samples(), config=hooks_config(), modules=MODULES, project="tiny")
        trainer = RecordingTrainer(**parts, callbacks=[recorder, callback])
        trainer.train(resume_from_checkpoint=options.resume or None)
        trainer.evaluate(metric_key_prefix="test")
        callback.close()
        assert callback.failures() == {}, callback.failures()
        assert "compute_loss" not in vars(trainer)
        assert "clip_grad_norm_" not in vars(trainer.accelerator)
        kept: dict[str, Any] = {**trainer.arrays, **recorder.arrays, "vocabulary": np.array([len(WORDS), EOS, IMAGE])}
        part = "second" if options.resume else "first"
        np.savez(options.out / f"{part}.npz", **kept)
    if options.restart_at and not options.resume:
        os.execv(sys.executable, [sys.executable, *sys.argv, "--resume"])  # noqa: S606  (knows the checkpoint alone)
    torch.save(trainer.model.state_dict(), options.out / "weights.pt")


if __name__ == "__main__":
    main()
