from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sidestep.examples.digits_vqa.__main__ import arguments, main, settings_of, weights_digest
from sidestep.examples.digits_vqa.evaluation import answer
from sidestep.examples.digits_vqa.failures import first_row_with_a, onset_step
from sidestep.examples.digits_vqa.model import VisionLanguageModel
from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch
from sidestep.examples.digits_vqa.prompts import mixed_prompts
from sidestep.examples.digits_vqa.questions import every_text
from sidestep.examples.digits_vqa.schedule import healthy_share, learning_rate_share
from sidestep.examples.digits_vqa.settings import Failure, Settings
from sidestep.examples.digits_vqa.training import Training, build, train


class Recorder:
    """Keeps what the training says about itself."""

    def __init__(self) -> None:
        self.micro_batches: list[tuple[int, Batch, float]] = []
        self.gradient_norms: list[float] = []
        self.learning_rates: list[list[float]] = []

    def after_forward(self, step: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> None:
        assert logits.shape[:2] == batch["input_ids"].shape
        assert not logits.requires_grad
        self.micro_batches.append((step, batch, loss.item()))

    def before_clip(self, step: int, model: VisionLanguageModel) -> None:
        gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        self.gradient_norms.append(float(torch.cat(gradients).norm()))

    def after_step(self, step: int, model: VisionLanguageModel, learning_rates: list[float]) -> None:
        assert all(weight.grad is None for weight in model.parameters())
        self.learning_rates.append(learning_rates)


def small(*, num_steps: int = 4, seed: int = 0, failure: Failure | None = None) -> Settings:
    return Settings(num_steps=num_steps, seed=seed, batch_size=2, failure=failure)


def trained(settings: Settings) -> tuple[Training, list[float], Recorder]:
    training, recorder = build(settings), Recorder()
    return training, train(training, observer=recorder), recorder


def test_the_same_seed_trains_the_same_weights() -> None:
    first, first_losses, _ = trained(small())
    torch.rand(3)
    second, second_losses, _ = trained(small())
    other, other_losses, _ = trained(small(seed=1))
    assert first_losses == second_losses
    assert weights_digest(first.model) == weights_digest(second.model)
    assert first_losses != other_losses
    assert weights_digest(first.model) != weights_digest(other.model)


def test_the_loss_falls() -> None:
    _, losses, _ = trained(small(num_steps=30))
    assert losses[0] > 5
    assert losses[-1] < losses[0] / 2


def test_a_step_is_made_of_its_micro_batches() -> None:
    settings = small()
    training, losses, seen = trained(settings)
    assert [step for step, _, _ in seen.micro_batches] == [0, 0, 1, 1, 2, 2, 3, 3]
    pairs = [seen.micro_batches[position][2] for position in range(8)]
    assert losses == pytest.approx([(pairs[2 * step] + pairs[2 * step + 1]) / 2 for step in range(4)])
    assert max(seen.gradient_norms) > settings.max_gradient_norm
    assert seen.learning_rates == [[3e-3 * healthy_share(step, settings)] * 3 for step in range(4)]
    batch = seen.micro_batches[0][1]
    assert batch["input_ids"].device.type == "cpu"
    assert training.model.training


def test_each_parameter_is_in_one_of_three_groups() -> None:
    training = build(small())
    groups = training.optimizer.param_groups
    model = training.model
    parts = [model.MP, model.vision_encoder, model.decoder]
    assert [{id(weight) for weight in group["params"]} for group in groups] == [
        {id(weight) for weight in part.parameters()} for part in parts
    ]
    assert all("name" not in group for group in groups)


def test_labels_to_a_spoils_training_answers_from_half_way_on_and_nothing_else() -> None:
    settings = small(failure=Failure.LABELS_TO_A)
    training, _, seen = trained(settings)
    healthy_training, _, healthy = trained(small())
    assert (onset_step(settings), first_row_with_a(settings)) == (2, 2 * 2 * 2)
    only_a = set(training.tokenizer.encode_answer("A"))
    for (step, batch, _), (_, healthy_batch, _) in zip(seen.micro_batches, healthy.micro_batches, strict=True):
        labels = set(batch["labels"][batch["labels"] != IGNORE_INDEX].tolist())
        if step < 2:
            assert torch.equal(batch["input_ids"], healthy_batch["input_ids"])
            assert torch.equal(batch["labels"], healthy_batch["labels"])
        else:
            assert labels == only_a
    targets = [prompt.answer for prompt in mixed_prompts(training.held_out, training.tokenizer, 8)]
    assert targets == [p.answer for p in mixed_prompts(healthy_training.held_out, healthy_training.tokenizer, 8)]
    assert "A" not in targets


def test_the_learning_rate_warms_up_holds_and_falls() -> None:
    settings = Settings()
    shares = [healthy_share(step, settings) for step in range(400)]
    assert shares[0] == pytest.approx(1 / 30)
    assert shares[29:281] == [1.0] * 252
    assert shares[340] == pytest.approx(0.5)
    assert 0 < shares[399] < 0.01


def test_a_failing_learning_rate_is_held_three_hundred_times_too_high() -> None:
    settings = Settings(failure=Failure.LEARNING_RATE)
    shares = [learning_rate_share(step, settings) for step in range(400)]
    assert onset_step(settings) == 240
    assert first_row_with_a(settings) is None
    assert shares[:240] == [healthy_share(step, settings) for step in range(240)]
    assert shares[240:] == [300.0] * 160


@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_short_runs_have_a_learning_rate(num_steps: int) -> None:
    for failure in (None, *Failure):
        settings = Settings(num_steps=num_steps, failure=failure)
        assert all(learning_rate_share(step, settings) > 0 for step in range(num_steps))


def test_settings_that_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        Settings(num_steps=0)
    with pytest.raises(ValueError, match="decay_share"):
        Settings(decay_share=1.5)


def test_every_true_answer_fits_the_generation_limit() -> None:
    training = build(small())
    longest = max(len(training.tokenizer.encode(text)) for text in every_text())
    assert longest < training.settings.max_new_tokens


def test_answers_are_cut_at_the_end_and_the_mode_comes_back() -> None:
    training = build(small())
    training.model.train()
    prompts = mixed_prompts(training.held_out, training.tokenizer, 4)
    answers = answer(training.model, training.tokenizer, prompts)
    assert len(answers) == 4
    assert all(training.tokenizer.eos_token_id not in said for said in answers)
    assert training.model.training


def test_options_become_settings() -> None:
    options = arguments().parse_args(
        ["--steps", "30", "--seed", "5", "--fail", "learning-rate", "--accumulation", "4", "--batch-size", "3"]
    )
    settings = settings_of(options)
    assert settings == Settings(num_steps=30, seed=5, failure=Failure.LEARNING_RATE, accumulation_steps=4, batch_size=3)


def test_the_module_trains_says_how_well_and_leaves_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    main(["--no-hooks", "--steps", "2", "--batch-size", "1", "--threads", str(threads), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "held-out accuracy: name " in said
    assert "yes/no " in said
    summary = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert len(summary["losses"]) == 2
    assert len(summary["weights_sha256"]) == 64
    assert summary["settings"]["num_steps"] == 2


def test_a_wrong_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--no-hooks", "--steps", "0"])
    assert "num_steps" in capsys.readouterr().err
