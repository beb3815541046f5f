"""Runs nanoVLM's real train.py, tiny and on the CPU, and records every raw tensor beside it (test_real_nanovlm.py).

    nanovlm_training.py prepare DATA --conversations N
    nanovlm_training.py train CHECKOUT TRAIN_PY DATA OUT [--accumulation N] [--steps N] [--compile] [--unpatched]
                        [--as-is] [--record]

TRAIN_PY is its train.py with or without the lines of docs/nanovlm.md; the rest comes from CHECKOUT. Nothing is fetched:
tokenizer, pictures and conversations are made by ``prepare``, the backbones are random. With RANK in the environment it
is one rank of a gloo group.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

RUN_NAME = "tiny"
EXTRA_TOKENS = {
    "image_token": "<|image|>",
    "global_image_token": "<|global_image|>",
    **{f"r{i}c{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)},
}
BATCH_INTERVAL, GRADIENT_INTERVAL, GENERATION_INTERVAL, ANSWER_INTERVAL = 3, 5, 10, 6
NUM_SAMPLES, MAX_NEW_TOKENS, NUM_VALIDATION = 6, 10, 32
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 230), "white": (240, 240, 240)}
WEIGHTS_SCALE = 8.0
LMMS_STEP, LMMS_VALUE = 4, 0.25


def wanted(name: str) -> Any:
    """A module of nanoVLM's environment, which this project's own has not."""
    return importlib.import_module(name)


def prepare(data: Path, num_conversations: int) -> None:
    """Write a tokenizer and a data set of coloured pictures with questions about them."""
    datasets, pictures = wanted("datasets"), wanted("PIL.Image")

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_conversations):
        colour = str(rng.choice(list(COLOURS)))
        shape = [(32, 32), (64, 32), (30, 50)][int(rng.integers(3))]
        picture = pictures.new("RGB", shape, COLOURS[colour])
        turns = [{"user": "Which colour is it?", "assistant": colour}]
        if rng.random() < 0.3:
            turns.append({"user": "Is it wide?", "assistant": "Yes, it is." if shape[0] > shape[1] else "No."})
        rows.append({"images": [picture], "texts": turns})
    text = datasets.Value("string")
    features = datasets.Features({
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List({"user": text, "assistant": text}),
    })  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(data / "shard_0"))
    write_tokenizer(data / "tokenizer", rows)


def write_tokenizer(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Train a byte-level tokenizer with ChatML's two marks on the conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    said = [text for row in rows for turn in row["texts"] for text in ("user\n", "assistant\n", *turn.values())]
    tokenizer.train_from_iterator(said, trainer)
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    wanted("transformers").PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)


class Recorder:
    """Keeps what docs/metrics.md needs to compute every metric again, by optimizer step and micro-step."""

    def __init__(self, *, everything: bool) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        self.losses: list[float] = []
        self._everything = everything
        self._step = self._microstep = self._epoch = 0
        self._model: Any = None
        self._prompts: list[tuple[list[int], list[torch.Tensor]]] = []

    def watch_model(self, outermost: torch.nn.Module, model: Any) -> None:
        self._model = model
        outermost.register_forward_hook(self._after_forward, with_kwargs=True)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def watch_validation(self, dataset: Any) -> None:
        """Make the prompts anew: the template's own generation prompt after the first user turn."""
        for item in dataset.dataset:
            tiles, counts = dataset._process_images(item["images"])
            messages = dataset._get_messages(item, counts)[:1]
            ids = dataset.tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )
            self._prompts.append((list(ids), tiles))
            if len(self._prompts) == NUM_SAMPLES:
                return

    def samples(self, validation_samples: Callable[..., Any]) -> Callable[..., Any]:
        """Keep the prompts that the hooks are going to use, beside those made anew."""

        def kept(*args: Any, **kwargs: Any) -> Any:
            made = validation_samples(*args, **kwargs)
            for number, (sample, (ids, tiles)) in enumerate(zip(made, self._prompts, strict=True)):
                self.arrays[f"prompt/{number}/made"] = np.array(sample.prompt())
                self.arrays[f"prompt/{number}/anew"] = np.array(ids)
                self.arrays[f"tiles/{number}/made"] = torch.cat(sample.inputs["images"]).numpy()
                self.arrays[f"tiles/{number}/anew"] = torch.cat(tiles).numpy()
            return made

        return kept

    def epochs(self, step_over: Callable[..., Any]) -> Callable[..., Any]:
        """Count the loop's own passes over its data; an evaluation makes one as well, with the model in its mode."""

        def counted(*args: Any) -> Any:
            self._epoch += int(self._model.training)
            return step_over(*args)

        return counted

    def clip(self, clip_grad_norm_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(clip_grad_norm_)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._everything and self._step % GRADIENT_INTERVAL == 0:
                for name, parameter in self._model.named_parameters():
                    if parameter.grad is not None:
                        self.arrays[f"gradient/{self._step}/{name}"] = parameter.grad.numpy().copy()
            norm = clip_grad_norm_(*args, **kwargs)
            self.arrays[f"norm/{self._step}"] = norm.numpy().copy()
            return norm

        return recorded

    def _after_forward(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        logits, loss = output
        self.losses.append(loss.item())
        place = f"batch/{self._step}/{self._microstep}"
        self._microstep += 1
        if not self._everything:
            return
        self.arrays[f"{place}/epoch"] = np.array(self._epoch)
        self.arrays[f"{place}/labels"] = kwargs["targets"].numpy().copy()
        if self._step % BATCH_INTERVAL == 0:
            self.arrays[f"{place}/input_ids"] = args[0].numpy().copy()
            self.arrays[f"{place}/mask"] = kwargs["attention_mask"].numpy().copy()
            self.arrays[f"{place}/logits"] = logits.detach().float().numpy().copy()
            self.arrays[f"{place}/loss"] = loss.detach().float().numpy().copy()

    def _before_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self.arrays[f"lr/{self._step}"] = np.array([group["lr"] for group in optimizer.param_groups])

    def _after_step(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self._everything and self._step % GENERATION_INTERVAL == 0:
            for number, (ids, tiles) in enumerate(self._prompts):
                self.arrays[f"generated/{self._step}/{number}"] = self._generate(ids, tiles)
            self.arrays[f"texts/{self._step}"] = np.array([
                self._content(self.arrays[f"generated/{self._step}/{number}"]) for number in range(len(self._prompts))
            ])  # fmt: skip
        self._step, self._microstep = self._step + 1, 0

    def _content(self, ids: NDArray[Any]) -> str:
        """The text before the first EOS."""
        before = ids.tolist()[: (ids == self._model.tokenizer.eos_token_id).argmax() if self._ended(ids) else None]
        return str(self._model.tokenizer.decode(before, skip_special_tokens=False))

    def _ended(self, ids: NDArray[Any]) -> bool:
        return bool((ids == self._model.tokenizer.eos_token_id).any())

    def _generate(self, ids: list[int], tiles: list[torch.Tensor]) -> NDArray[Any]:
        """nanoVLM's own greedy ``generate``, one prompt alone: no batch, no padding, nothing of the hooks'."""
        self._model.eval()
        # without its inference_mode, which would leave inference tensors in caches that the next backward needs
        generate = type(self._model).generate.__wrapped__
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            made = generate(
                self._model,
                torch.tensor([ids]),
                [tiles],
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=MAX_NEW_TOKENS,
                greedy=True,
            )
        self._model.train()
        made_ids: NDArray[Any] = made[0].numpy().copy()
        return made_ids


def tiny_configs(config: Any, data: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    """nanoVLM's own configurations, everything small; the three intervals count micro-batches, as in the seed's."""
    base = len(wanted("transformers").AutoTokenizer.from_pretrained(data / "tokenizer"))
    vlm = config.VLMConfig(
        vit_hidden_dim=32, vit_inter_dim=64, vit_patch_size=8, vit_img_size=32, vit_n_heads=2, vit_n_blocks=2,
        lm_hidden_dim=48, lm_inter_dim=96, lm_max_position_embeddings=256, lm_base_vocab_size=base,
        extra_token_amount=len(EXTRA_TOKENS), lm_vocab_size=base + len(EXTRA_TOKENS), lm_n_heads=4, lm_n_kv_heads=2,
        lm_n_blocks=2, lm_max_length=128, lm_tokenizer=str(data / "tokenizer"), mp_pixel_shuffle_factor=2,
        mp_image_token_length=4, max_img_size=64, resize_to_max_side_len=False, vlm_extra_tokens=dict(EXTRA_TOKENS),
        vlm_load_backbone_weights=False, vlm_checkpoint_path="checkpoints", hf_repo_name=None,
    )  # fmt: skip
    accumulation = options.accumulation
    train = config.TrainConfig(
        lr_mp=0.005, lr_vision_backbone=5e-4, lr_language_backbone=1e-3, val_size=NUM_VALIDATION, batch_size=2,
        gradient_accumulation_steps=accumulation, eval_interval=1, stats_log_interval=5,
        max_training_steps=options.steps, max_sample_length=120, compile=options.compile, stream_dataset=False,
        train_dataset_path=str(data), train_dataset_name=(str(data / "shard_0"),), wandb_entity="an-entity",
        log_wandb=not options.unpatched, use_lmms_eval=False,
    )  # fmt: skip
    train.generation_eval_interval = train.collapse_detection_interval = accumulation * GENERATION_INTERVAL
    train.gradient_log_interval = accumulation * GRADIENT_INTERVAL
    return vlm, train


def on_the_cpu(train: Any) -> None:
    """Join a gloo group where train.py asks for NCCL, and name the CPU where it asks for the current device."""
    torch.distributed.init_process_group("gloo")
    train.PG_CPU = torch.distributed.new_group(backend="gloo")
    barrier = torch.distributed.barrier
    setattr(torch.distributed, "barrier", lambda **_ignored: barrier())  # noqa: B010  (device_ids is NCCL's)
    setattr(torch.cuda, "current_device", lambda: "cpu")  # noqa: B010


def watched(train: Any, recorder: Recorder, *, is_ranked: bool, is_compiled: bool) -> None:
    """Put the recorder beside the outermost module, the optimizer and the clipping of train.py."""
    model_class, get_dataloaders = train.VisionLanguageModel, train.get_dataloaders
    adamw, compiled, moved = torch.optim.AdamW, torch.compile, model_class.to
    built: list[Any] = []

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        built.append(self)
        with torch.no_grad():  # as it begins it would repeat the last token of every prompt
            for name, parameter in self.named_parameters():
                parameter.mul_(WEIGHTS_SCALE if parameter.dim() > 1 and "token_embedding" not in name else 1.0)
        if not is_ranked and not is_compiled:
            recorder.watch_model(self, self)
        return moved(self, *args, **kwargs)

    def eagerly(model: Any) -> Any:
        made: Any = compiled(model, backend="eager")
        if not is_ranked:
            recorder.watch_model(made, model)
        return made

    def wrapped(model: Any) -> Any:
        made = torch.nn.parallel.DistributedDataParallel(model)
        recorder.watch_model(made, built[0])
        return made

    def loaders(*args: Any) -> Any:
        made = get_dataloaders(*args)
        recorder.watch_validation(made[1].dataset.dataset)
        return made

    model_class.to = to
    setattr(torch, "compile", eagerly)  # noqa: B010
    setattr(torch.optim, "AdamW", lambda groups: recorder.watch_optimizer(adamw(groups)))  # noqa: B010
    setattr(torch.nn.utils, "clip_grad_norm_", recorder.clip(torch.nn.utils.clip_grad_norm_))  # noqa: B010
    train.wrap_model, train.get_dataloaders = wrapped, loaders
    train.synchronized_dataloader_step = recorder.epochs(train.synchronized_dataloader_step)
    train.get_run_name = lambda *_configs: RUN_NAME


def load(checkout: Path, train_py: Path) -> Any:
    sys.path.insert(0, str(checkout))
    spec = importlib.util.spec_from_file_location("train", train_py)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def labels_as_nanovlm_means_them() -> None:
    """Have ``apply_chat_template`` return ids, as transformers 4 did: of version 5's map nanoVLM takes the length."""
    base: Any = wanted("transformers").PreTrainedTokenizerBase
    original = base.apply_chat_template

    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **{"return_dict": False, **kwargs})

    base.apply_chat_template = plain


def shorter_intervals(recorder: Recorder) -> None:
    """Give the documented call, which is not changed, the intervals that a run of 30 steps can show."""
    from sidestep.trainer_hooks.integrations import nanovlm  # noqa: PLC0415

    setattr(nanovlm, "validation_samples", recorder.samples(nanovlm.validation_samples))  # noqa: B010
    setattr(  # noqa: B010
        nanovlm,
        "attach",
        functools.partial(
            nanovlm.attach,
            token_stats_interval=BATCH_INTERVAL,
            loss_breakdown_interval=BATCH_INTERVAL,
            lr_interval=BATCH_INTERVAL,
            answer_length_interval=ANSWER_INTERVAL,
            generation_samples=NUM_SAMPLES,
            max_new_tokens=MAX_NEW_TOKENS,
        ),
    )


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data, out = options.data.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    train_py, checkout = options.train_py.resolve(), options.checkout.resolve()
    os.chdir(out)
    rank = int(os.environ.get("RANK", "0"))
    if not options.as_is:
        labels_as_nanovlm_means_them()
    recorder = Recorder(everything=options.record)
    if not options.unpatched:
        shorter_intervals(recorder)
    module = load(checkout, train_py)
    if "RANK" in os.environ:
        on_the_cpu(module)
    elif not options.unpatched:
        results = out / "eval_results" / RUN_NAME
        results.mkdir(parents=True)
        found = {"global_step": LMMS_STEP, "results": {"mmstar": LMMS_VALUE}}
        (results / f"step_{LMMS_STEP}.json").write_text(json.dumps(found), encoding="utf-8")
    watched(module, recorder, is_ranked="RANK" in os.environ, is_compiled=options.compile)
    vlm, configured = tiny_configs(module.config, data, options)
    module.train(configured, vlm)
    tokenizer = recorder._model.tokenizer
    facts = np.array([len(tokenizer), tokenizer.eos_token_id, tokenizer.image_token_id])
    weights = torch.cat([p.detach().flatten() for p in recorder._model.parameters()]).numpy()
    arrays: dict[str, Any] = {
        **recorder.arrays,
        "losses": np.array(recorder.losses),
        "weights": weights,
        "vocabulary": facts,
    }
    np.savez(out / f"rank{rank}.npz", **arrays)
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("data", type=Path)
    preparing.add_argument("--conversations", type=int, required=True)
    training = commands.add_parser("train")
    for name in ("checkout", "train_py", "data", "out"):
        training.add_argument(name, type=Path)
    training.add_argument("--accumulation", type=int, default=1)
    training.add_argument("--steps", type=int, default=30)
    for name in ("--compile", "--unpatched", "--as-is", "--record"):
        training.add_argument(name, action="store_true")
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.data, options.conversations)
    else:
        train(options)


if __name__ == "__main__":
    main()
