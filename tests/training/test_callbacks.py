"""A user's Lightning callback sees the same as in any other training with Lightning."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from llmft.core.errors import Paused
from llmft.train import train
from tests.conftest import run_directory
from tests.trust.helpers import status

HOOKS = [
    *("on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_train_start", "on_train_end"),
    *("on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"),
    *("on_validation_start", "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end", "on_fit_end"),
]


class Recording(Callback):
    """Records each hook with Lightning's counts and the batch's index."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.losses: list[tuple[float, float]] = []
        self.validations: list[float] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in HOOKS:
            return super().__getattribute__(name)

        def hook(trainer: L.Trainer, module: Any, *arguments: Any) -> None:
            index = arguments[-1] if "batch" in name else None
            self.calls.append((name, trainer.global_step, trainer.current_epoch, index))
            if name == "on_train_batch_end":
                self.losses.append((float(arguments[0]["loss"]), float(trainer.callback_metrics["train/loss_nats"])))
            if name == "on_validation_end" and not trainer.sanity_checking:
                self.validations.append(float(trainer.callback_metrics["val/loss_nats"]))

        return hook


class Plain(L.LightningModule):
    """A minimal module with manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, index: int) -> dict[str, torch.Tensor]:
        optimizer: Any = self.optimizers()
        optimizer.step()
        self.log("train/loss_nats", 0.0)
        return {"loss": self.weight.detach()}

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss_nats", 0.0)


LISTENS = "+trainer.callbacks.any._target_=lightning.pytorch.callbacks.LambdaCallback"


def watched(monkeypatch: pytest.MonkeyPatch, config: Any, *more: Any) -> Recording:
    """Trains with callbacks that are added after those of the config."""
    recording, trainer_of = Recording(), L.Trainer

    def trainer(*, callbacks: list[Any], **named: Any) -> L.Trainer:
        return trainer_of(callbacks=[*callbacks, recording, *more], **named)

    with monkeypatch.context() as patch:
        patch.setattr(L, "Trainer", trainer)
        train(config, quiet=True)
    return recording


def test_the_hooks_their_order_and_counts_are_those_of_a_plain_module(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 48 rows are 6 steps a pass: two passes and two steps, and a last validation of its own.
    ours = watched(
        monkeypatch, small(LISTENS, "trainer.max_steps=14", "trainer.validate_every=3", "task.generate_rows=0")
    )
    theirs = Recording()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=15,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=3,
        num_sanity_val_steps=-1,
        logger=False,
        callbacks=[theirs],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Plain(), DataLoader(range(6)), DataLoader(range(1)))  # type: ignore[arg-type]
    # Theirs ends with the validation at step 15, ours with that at step 14.
    last = [call for call in theirs.calls if call[1:] != (14, 2, 2) and call[:2] != ("on_train_batch_end", 15)]
    assert ours.calls == [(name, min(step, 14), *rest) for name, step, *rest in last]
    assert all(loss == pytest.approx(metric) for loss, metric in ours.losses)
    assert len(ours.losses) == 14
    assert len(set(ours.validations)) == 5


def test_the_counts_go_on_over_a_resumption(small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *arguments: Any) -> None:
            if trainer.global_step == 9:
                raise Paused("enough")

    config = small(LISTENS, "trainer.max_steps=14", "trainer.checkpoint_every=1", "task.generate_rows=0")
    with pytest.raises(Paused):
        watched(monkeypatch, config, Stop())
    steps = [call[1:3] for call in watched(monkeypatch, config).calls if call[0] == "on_train_batch_end"]
    assert steps == [(step, (step - 1) // 6) for step in range(10, 15)]


def test_early_stopping_of_lightnings_stops_on_our_metrics_and_is_told(
    small: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss_nats, patience: 1, min_delta: 99}"
    config = small("trainer.max_steps=14", "trainer.validate_every=2", f"+trainer.callbacks.stop={node}")
    train(config)
    result = status(run_directory(tmp_path))["result"]
    assert (result["steps"], result["stopped_early"]) == (4, True)
    assert "stopped early after step 4 of 14: a callback of trainer.callbacks asked for it." in capsys.readouterr().out


def test_the_learning_rate_monitor_logs_every_step_as_llmft_does(small: Callable[..., Any], tmp_path: Path) -> None:
    node = "{_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    train(small(f"+trainer.callbacks.rate={node}", "logger=csv", "trainer.max_steps=4"), quiet=True)
    (file,) = run_directory(tmp_path).rglob("metrics.csv")
    with file.open() as lines:
        rates = [line["lr-AdamW"] for line in csv.DictReader(lines) if line["lr-AdamW"]]
    assert len(rates) == 5  # at the start of training, and after each step
