"""The progress bar as a callback."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from llmft.core.console import Screen, StepProgress
from llmft.training.callbacks import Recorder
from llmft.training.finetuner import FineTuner


class ShowProgress(Callback):
    """Draws steps and validations on the screen of the first process."""

    def __init__(self, screen: Screen, recorder: Recorder, total_steps: int, show_rows: int, enabled: bool) -> None:
        self.screen = screen
        self.recorder = recorder
        self.bar = StepProgress(screen, total_steps, enabled=enabled)
        self.show_rows = show_rows
        self.total_steps = total_steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Shows the bar."""
        assert isinstance(module, FineTuner)
        if trainer.is_global_zero:
            self.bar.start(module.step)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Moves the bar."""
        assert isinstance(module, FineTuner)
        if trainer.is_global_zero:
            self.bar.update(module.step, module.train_metrics["train/loss_nats"], self.recorder.tokens_per_s)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Says what the validation found."""
        assert isinstance(module, FineTuner)
        validation = module.validation
        if not trainer.is_global_zero or validation is None:
            return
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in validation.metrics.items())
        if module.trained_on_validation and validation.split == "val":
            numbers = "trained on all rows, so no validation tells anything"
        self.bar.screen.print(f"step {validation.step:>{len(str(self.total_steps))}}/{self.total_steps}  {numbers}")
        if validation.step == 0 or validation.step == self.total_steps:
            self.screen.samples(validation.samples, self.show_rows, validation.step)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Takes the bar away."""
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Takes the bar away before the error is printed."""
        self.bar.stop()
