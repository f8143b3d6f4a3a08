"""What happens around the steps: records, checkpoints, signals, the progress bar."""

from __future__ import annotations

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from llmft.checkpoint import Checkpoint, prune, save_checkpoint
from llmft.config import Mode
from llmft.data.batch import StepBatch
from llmft.errors import ConfigError, DiskError, Interrupted, did_you_mean
from llmft.runs import Run, append_line, write_row_losses
from llmft.training.finetuner import FineTuner, Validation


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use so far: of the allocator on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


class Recorder(Callback):
    """Writes every number to the run directory, and hands the same to the loggers.

    `metrics.jsonl` holds what the config determines and is the same on every run of it; `timing.jsonl` the rest.
    """

    def __init__(
        self,
        run: Run,
        *,
        seconds_before: float = 0.0,
        describe: Mapping[str, Callable[[int], str]] | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        self.run = run
        self.labels = labels
        self.describe = describe or {}
        self.seconds_before = seconds_before
        self.started = time.monotonic()
        self.tokens_per_s = 0.0
        self._since = self.started

    @property
    def seconds(self) -> float:
        """Time in training and validation, over all resumptions."""
        return self.seconds_before + time.monotonic() - self.started

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        """Starts the clock of a step."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: StepBatch, index: int
    ) -> None:
        """Records a step."""
        assert isinstance(module, FineTuner)
        seconds = max(time.monotonic() - self._since, 1e-9)
        tokens = sum(micro.num_tokens for micro in batch.micro_batches) * trainer.world_size
        self.tokens_per_s = tokens / seconds
        timing = {
            "train/tokens_per_s": self.tokens_per_s,
            "train/step_s": seconds,
            "memory/peak_gib": peak_memory_gib(module.device),
        }
        self._write(trainer, module.step, module.train_metrics, timing)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Records a validation and its samples."""
        assert isinstance(module, FineTuner)
        found = module.validation
        assert found is not None
        self._write(trainer, found.step, found.metrics, {f"{found.split}/elapsed_s": self.seconds})
        if trainer.is_global_zero:
            if found.rows:
                describe = self.describe.get(found.split, str)
                path = self.run.row_losses_file(found.split, found.step)
                write_row_losses(path, found.rows, describe, self.labels, found.outputs)
            for sample in found.samples:
                append_line(self.run.samples_file, {"step": found.step, "split": found.split, **sample})
            for logger in trainer.loggers:
                log_samples = getattr(logger, "log_samples", None)
                if log_samples is not None and found.samples:
                    log_samples(found.step, found.samples)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # type: ignore[override]
        """Records a test likewise."""
        self.on_validation_end(trainer, module)

    def _write(self, trainer: L.Trainer, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        append_line(self.run.metrics_file, {"step": step, **metrics})
        append_line(self.run.timing_file, {"step": step, **timing})
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, **timing}, step=step)


class Signals:
    """Notes a signal until a step boundary; a second one of the same kind ends the process at once."""

    KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def take(self) -> None:
        """Takes the signals over; again and again, since Lightning takes SIGTERM for itself when a loop begins."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in self.KINDS:
            before = signal.signal(signum, self._note)
            self._before.setdefault(signum, before)

    def release(self) -> None:
        """Gives them back."""
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def _note(self, signum: int, frame: Any) -> None:
        if self.received == signum:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.received = signum


class Checkpointer(Callback):
    """Saves at step boundaries, keeps the best, stops early, and saves before a signal ends the process.

    A checkpoint of a step whose validation is still to come says so (`pending`): the resumed run begins with it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every: int | None,
        keep: int,
        monitor: str,
        mode: Mode,
        patience: int | None,
        total_steps: int,
        stops: Collection[int],
        signals: Signals,
        state: dict[str, Any] | None = None,
        seconds: Callable[[], float] = lambda: 0.0,
        command: str = "",
    ) -> None:
        self.directory = directory
        self.every = every
        self.keep = keep
        self.monitor = monitor
        self.sign = 1.0 if mode is Mode.min else -1.0
        self.patience = patience
        self.total_steps = total_steps
        self.stops = set(stops)
        self.signals = signals
        self.seconds = seconds
        self.command = command
        state = state or {}
        self.best_value: float | None = state.get("best_value")
        self.best_step: int | None = state.get("best_step")
        self.waited: int = state.get("waited", 0)
        self.stopped_early: bool = state.get("stopped_early", False)
        self.pending: bool = state.get("pending", False)
        self.loss_scale: dict[str, Any] | None = state.get("loss_scale")

    def state(self, trainer: L.Trainer) -> dict[str, Any]:
        """What a resumed run needs besides tensors."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return {
            "best_value": self.best_value,
            "best_step": self.best_step,
            "waited": self.waited,
            "stopped_early": self.stopped_early,
            "pending": self.pending,
            "seconds": self.seconds(),
            "loss_scale": scaler.state_dict() if scaler is not None else None,
        }

    # Signals. A handler only notes the wish; it is met at the end of the step or batch under way.

    def on_sanity_check_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Takes the signals for the validation before training."""
        self.signals.take()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Takes the signals for the training; puts the loss scale back under fp16."""
        self.signals.take()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and self.loss_scale:
            scaler.load_state_dict(self.loss_scale)
        trainer.should_stop = self.stopped_early

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Takes the signals for the test."""
        self.signals.take()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Saves when it is time, or when a signal came."""
        assert isinstance(module, FineTuner)
        asked = self._agree(trainer, module)
        self.pending = module.step in self.stops
        if asked or (self.every is not None and module.step % self.every == 0 and not self.pending):
            self.save(trainer, module)
        self._leave(asked, module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        """Leaves a validation that a signal interrupts; the step before it is saved and waits for its validation."""
        assert isinstance(module, FineTuner)
        asked = self._agree(trainer, module)
        if asked and module.step > 0:
            self.save(trainer, module)
        self._leave(asked, module)

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        """Leaves the test, which a resumed run takes again from its beginning."""
        assert isinstance(module, FineTuner)
        self._leave(self._agree(trainer, module), module)

    def _leave(self, asked: int, module: FineTuner) -> None:
        if asked:
            name = signal.Signals(asked).name
            raise Interrupted(
                f"{name}: saved after step {module.step} of {self.total_steps}; the same command goes on from there"
                + (f": {self.command}" if self.command else "."),
                asked,
            )

    def _agree(self, trainer: L.Trainer, module: L.LightningModule) -> int:
        """The signal that any process got, so that all of them stop at the same step; 0 for none."""
        mine = self.signals.received
        if trainer.world_size == 1:
            return mine
        asked = torch.tensor(mine, device=module.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return int(asked)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Compares with the best, and saves; not before training, where there is nothing to save yet."""
        assert isinstance(module, FineTuner)
        assert module.validation is not None
        value = self._monitored(module.validation)
        if trainer.sanity_checking and not self.pending:
            return
        self.pending = False
        # A loss that is not a number is no best value, and one that is beats it.
        better = self.best_value is None or self.sign * value < self.sign * self.best_value
        if math.isfinite(value) and better:
            self.best_value, self.best_step, self.waited = value, module.step, 0
        else:
            self.waited += 1
            if self.patience is not None and self.waited >= self.patience:
                self.stopped_early = True
                trainer.should_stop = True
        self.save(trainer, module)
        self._leave(self._agree(trainer, module), module)

    def _monitored(self, validation: Validation) -> float:
        try:
            return validation.metrics[self.monitor]
        except KeyError:
            raise ConfigError(
                f"trainer.monitor={self.monitor}: no such metric{did_you_mean(self.monitor, validation.metrics)}"
            ) from None

    def save(self, trainer: L.Trainer, module: FineTuner) -> None:
        """Writes a checkpoint from the first process, then drops old ones."""
        weights, optimizer = module.weights(), module.optimizer_state()
        if not trainer.is_global_zero:
            return
        checkpoint = Checkpoint(module.step, weights, optimizer, self.state(trainer))
        try:
            save_checkpoint(self.directory, checkpoint)
        except OSError as error:
            raise DiskError(
                f"the checkpoint of step {module.step} could not be written to {self.directory} ({error.strerror}); "
                "earlier ones are intact: free some space and run the same command."
            ) from error
        prune(self.directory, self.keep, {self.best_step} if self.best_step is not None else set())
