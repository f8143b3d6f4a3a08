"""Who looks on while a run trains: told of every step and validation, and free to end the run after one."""

from __future__ import annotations

import time
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.callbacks import Callback

from llmft.core.errors import Stopped

STEP_EVERY_S = 0.25
"""Steps are told at most so often: a fast model makes hundreds a second."""


class TrialReporter(Protocol):
    """Someone outside the run."""

    def step(self, step: int, total: int, loss: float, tokens_per_s: float) -> None:
        """An optimizer step was taken."""

    def alive(self) -> None:
        """Something went on: a batch of a validation, a phase of the start."""

    def validation(self, step: int, total: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        """A validation is done and its checkpoint written; returns (status, reason) to end the run here."""


class ReportTrial(Callback):
    """Tells a TrialReporter. Of a distributed run the first process has one, and it is never told to stop."""

    def __init__(
        self, reporter: TrialReporter, total_steps: int, speed: Any, resumed_at: dict[str, float] | None = None
    ) -> None:
        self.reporter, self.total_steps, self.speed, self.resumed_at = reporter, total_steps, speed, resumed_at
        self._reported_at = 0.0

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._reported_at < STEP_EVERY_S:
            return False
        self._reported_at = now
        return True

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Tells the validation after which the run goes on, once more: the answer may have been lost with a process."""
        if self.resumed_at is not None:
            self._ask(module, self.resumed_at)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if self._due() or module.step == self.total_steps:
            self.reporter.step(module.step, self.total_steps, module.train_metrics["train/loss_nats"], self.speed())

    def on_validation_batch_end(self, *_: Any) -> None:
        if self._due():
            self.reporter.alive()

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Tells the numbers and obeys; the last validation ends nothing, since the run is over anyway."""
        self._ask(module, module.validation.metrics)

    def _ask(self, module: Any, metrics: dict[str, float]) -> None:
        answer = self.reporter.validation(module.step, self.total_steps, metrics)
        if answer is not None and 0 < module.step < self.total_steps:
            status, reason = answer
            raise Stopped(reason, status)
