"""Interface that receives a run's progress and may stop it."""

from __future__ import annotations

import time
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.callbacks import Callback

from llmft.core.errors import Stopped

STEP_EVERY_S = 0.25
"""Seconds between reported steps: a fast model makes hundreds of steps a second."""


class TrialReporter(Protocol):
    """Receives a run's progress."""

    def step(self, step: int, total: int, loss: float, tokens_per_s: float) -> None:
        """An optimizer step was taken."""

    def alive(self) -> None:
        """The run made progress: a batch of a validation, a phase of the start."""

    def validation(self, step: int, total: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        """A validation is done and its checkpoint written; returns (status, reason) to end the run here."""


class ReportTrial(Callback):
    """Calls a TrialReporter. In a distributed run only the first process has one, and it never stops the run."""

    def __init__(
        self, reporter: TrialReporter, total_steps: int, speed: Any, resumed_at: dict[str, float] | None
    ) -> None:
        """`speed` returns tokens per second; `resumed_at`: metrics of the validation that a resumed run starts from."""
        self.reporter, self.total_steps, self.speed, self.resumed_at = reporter, total_steps, speed, resumed_at
        self._reported_at = 0.0

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._reported_at < STEP_EVERY_S:
            return False
        self._reported_at = now
        return True

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Reports the validation that the run resumes from again: the answer may have been lost with a process."""
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
        """Reports the metrics and obeys the answer, except at the last step."""
        self._ask(module, module.validation.metrics)

    def _ask(self, module: Any, metrics: dict[str, float]) -> None:
        answer = self.reporter.validation(module.step, self.total_steps, metrics)
        if answer is not None and 0 < module.step < self.total_steps:
            status, reason = answer
            raise Stopped(reason, status)
