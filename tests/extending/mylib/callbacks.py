from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class LossDiary(Callback):
    """Writes the loss of every step to a file, using only Lightning's documented interface."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One line a step."""
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step} {batch_idx} {trainer.callback_metrics['train/loss_nats']:.4f}\n")
