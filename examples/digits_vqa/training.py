"""The training loop, as a trainer of nanoVLM's kind writes it, with Sidestep's calls where they belong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch.utils.data import DataLoader

import sidestep
from sidestep.examples.digits_vqa.digits import DigitImages, load_splits
from sidestep.examples.digits_vqa.failures import first_row_with_a
from sidestep.examples.digits_vqa.model import VisionLanguageModel
from sidestep.examples.digits_vqa.packing import Batch, PackedRows, Row, collate
from sidestep.examples.digits_vqa.progress import Progress
from sidestep.examples.digits_vqa.prompts import mixed_prompts
from sidestep.examples.digits_vqa.schedule import learning_rate_share
from sidestep.examples.digits_vqa.settings import Settings
from sidestep.examples.digits_vqa.tokenizer import ChatTokenizer

_BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """All that a run trains with."""

    settings: Settings
    """What the run is made of."""
    tokenizer: ChatTokenizer
    """Text to ids and back."""
    model: VisionLanguageModel
    """What is trained."""
    optimizer: torch.optim.AdamW
    """Three groups without names, as in nanoVLM: projector, vision encoder, decoder."""
    loader: DataLoader[Row]
    """An endless stream of batches on the CPU."""
    held_out: DigitImages
    """Images that are never trained on."""


class Observer(Protocol):
    """What a test or a benchmark may look at in a run; it changes nothing."""

    def after_forward(self, step: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> None:
        """See a micro-batch of optimizer step `step`, its logits [B, T, V] and its loss, before the backward."""

    def before_clip(self, step: int, model: VisionLanguageModel) -> None:
        """See the model with the gradients of the whole step, not yet clipped."""

    def after_step(self, step: int, model: VisionLanguageModel, learning_rates: list[float]) -> None:
        """See the model after the update, and the rate of each parameter group that it was taken with."""


def build(settings: Settings) -> Training:
    """Return all that a run needs; the same settings give the same weights and the same batches."""
    tokenizer = ChatTokenizer()
    training_images, held_out = load_splits()
    torch.manual_seed(settings.seed)
    model = VisionLanguageModel(
        vocabulary_size=len(tokenizer),
        image_token_id=tokenizer.image_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).to(settings.device)
    groups = [
        {"params": list(model.MP.parameters()), "lr": settings.learning_rate_projector},
        {"params": list(model.vision_encoder.parameters()), "lr": settings.learning_rate_vision},
        {"params": list(model.decoder.parameters()), "lr": settings.learning_rate_language},
    ]
    rows = PackedRows(
        training_images,
        tokenizer,
        length=settings.row_length_tokens,
        seed=settings.seed,
        first_row_with_a=first_row_with_a(settings),
    )
    return Training(
        settings=settings,
        tokenizer=tokenizer,
        model=model,
        optimizer=torch.optim.AdamW(groups, betas=_BETAS, weight_decay=settings.weight_decay),
        loader=DataLoader(rows, settings.batch_size, collate_fn=collate, generator=torch.Generator()),
        held_out=held_out,
    )


def generation_samples(training: Training) -> list[sidestep.Sample]:
    """Return the held-out prompts that the hooks generate from, prepared once."""
    prompts = mixed_prompts(training.held_out, training.tokenizer, training.settings.num_generation_samples)
    return [
        sidestep.Sample(
            question=prompt.question,
            target=prompt.answer,
            image=prompt.picture,
            prompt_ids=prompt.ids,
            target_ids=prompt.answer_ids,
            inputs={"images": prompt.tiles},
        )
        for prompt in prompts
    ]


def hooks_config(settings: Settings) -> sidestep.HooksConfig:
    """Return the hooks' intervals, shorter than their defaults since the run is short."""
    return sidestep.HooksConfig(
        token_stats_interval=settings.batch_interval_steps,
        loss_breakdown_interval=settings.batch_interval_steps,
        lr_interval=settings.batch_interval_steps,
        generation_eval_interval=settings.generation_interval_steps,
        collapse_detection_interval=settings.collapse_interval_steps,
        gradient_log_interval=settings.gradient_interval_steps,
        answer_length_interval=settings.answer_interval_steps,
        generation_samples=settings.num_generation_samples,
        max_new_tokens=settings.max_new_tokens,
    )


def attach_hooks(training: Training) -> sidestep.Hooks:
    """Attach Sidestep to the run."""
    settings = training.settings
    return sidestep.attach(
        training.model,
        training.optimizer,
        tokenizer=training.tokenizer,
        samples=generation_samples(training),
        config=hooks_config(settings),
        project="sidestep-demo",
        name=f"digits-{settings.failure or 'healthy'}-seed{settings.seed}",
        tags=["digits-vqa", settings.failure or "healthy"],
        run_config=asdict(settings),
        step=0,
    )


def train(
    training: Training,
    hooks: sidestep.Hooks | None = None,
    observer: Observer | None = None,
    *,
    show_progress: bool = False,
) -> list[float]:
    """Train the model to the end of the run and return the loss of each optimizer step."""
    settings, model, optimizer = training.settings, training.model, training.optimizer
    peak_rates = [float(group["lr"]) for group in optimizer.param_groups]
    batches: Iterator[Batch] = iter(training.loader)
    losses: list[float] = []
    model.train()
    progress = Progress(settings.num_steps, shown=show_progress)
    for step in progress:
        loss_sum = 0.0
        for _ in range(settings.accumulation_steps):
            batch = next(batches)
            logits, loss = _forward(model, batch)
            if hooks is not None:
                hooks.on_batch(
                    input_ids=batch["input_ids"],
                    labels=batch["labels"],
                    attention_mask=batch["attention_mask"],
                    logits=logits.detach(),
                    loss=loss.detach(),
                    shifted=True,
                    epoch=batch["epoch"],
                )
            if observer is not None:
                observer.after_forward(step, batch, logits.detach(), loss.detach())
            (loss / settings.accumulation_steps).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item()
        if hooks is not None:
            hooks.before_clip()
        if observer is not None:
            observer.before_clip(step, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
        for group, peak_rate in zip(optimizer.param_groups, peak_rates, strict=True):
            group["lr"] = peak_rate * learning_rate_share(step, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if hooks is not None:
            hooks.after_step(step)
        if observer is not None:
            observer.after_step(step, model, [float(group["lr"]) for group in optimizer.param_groups])
        losses.append(loss_sum / settings.accumulation_steps)
        progress.step_done(step, losses[-1])
    return losses


def _forward(model: VisionLanguageModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and loss of one micro-batch; the batch itself stays on the CPU."""
    device = next(model.parameters()).device
    logits, loss = model(
        batch["input_ids"].to(device),
        batch["images"],
        attention_mask=batch["attention_mask"].to(device),
        targets=batch["labels"].to(device),
    )
    return logits, loss
