"""Lightning callbacks: records, checkpoints, and the progress bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from llmft.config.data import TrainOn
from llmft.config.sections import TrainConfig
from llmft.config.trainer import OnSaveError
from llmft.core.console import Screen, StepProgress
from llmft.core.errors import ConfigError, DiskError, DivergedError, Interrupted, Paused, did_you_mean
from llmft.data.batch import StepBatch
from llmft.data.examples import Example
from llmft.runs.checkpoint import Checkpoint, prune, save_checkpoint, steps_on_disk
from llmft.runs.directory import Run
from llmft.runs.records import append_line, write_row_losses
from llmft.training.finetuner import FineTuner
from llmft.training.out_of_memory import is_out_of_memory, release_tensors
from llmft.training.stopping import SAVE, SIGNAL, StopRequests, describe_request
from llmft.training.validation import Validation

OTHER_MACHINE = 1e-3
"""Relative difference of a loss above what one machine repeats to; another one in bf16 may exceed it."""
OTHER_RUN = 0.05
"""Relative difference that no change of machine explains: other weights or other rows."""


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use: of the allocator on CUDA since this run began, of the process on a CPU; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


def count_from(trainer: L.Trainer, step: int, steps_per_epoch: int) -> None:
    """Sets a new trainer's counts (global_step, current_epoch, batch_idx) to those after `step` steps of a run."""
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.total.increment_by(step)
    loop.manual_optimization.optim_step_progress.total.increment_by(step)
    trainer.fit_loop.epoch_progress.current.increment_by(step // steps_per_epoch)


class Recorder(Callback):
    """Writes every number to the run directory, and sends it to the loggers.

    `metrics.jsonl` has the numbers that the config determines, equal in every run of it; `timing.jsonl` the rest.
    """

    def __init__(
        self, run: Run, splits: Mapping[str, Sequence[Example]], columns: Sequence[str], seconds_before: float
    ) -> None:
        self.run, self.columns, self.seconds_before = run, columns, seconds_before
        self.rows = {"val": splits.get("validation", ()), "test": splits.get("test", ())}
        self.started = self._since = time.monotonic()
        self.tokens_per_s = 0.0

    @property
    def seconds(self) -> float:
        """Time in training and validation, over all resumptions."""
        return self.seconds_before + time.monotonic() - self.started

    def on_train_batch_start(self, *_: Any) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: StepBatch, index: int) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        tokens = sum(micro.num_tokens for micro in batch.micro_batches) * trainer.world_size
        self.tokens_per_s = tokens / seconds
        timing = {
            "train/tokens_per_s": self.tokens_per_s,
            "train/step_s": seconds,
            "memory/peak_gib": peak_memory_gib(module.device),
        }
        self._write(trainer, module.step, module.train_metrics, timing)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        validation: Validation = module.validation
        split, step = validation.split, validation.step
        self._write(trainer, step, validation.metrics, {f"{split}/elapsed_s": self.seconds})
        if not trainer.is_global_zero:
            return
        if validation.rows:
            examples = self.rows[split]
            write_row_losses(
                self.run.row_losses_file(split, step),
                validation.rows,
                lambda row: examples[row].where,
                self.columns,
                validation.outputs,
                groups=[examples[row].conversation.group for row, _, _ in validation.rows],
                scores=validation.scores,
            )
        for sample in validation.samples:
            append_line(self.run.samples_file, {"step": step, "split": split, **sample})
        for logger in trainer.loggers:
            if validation.samples and hasattr(logger, "log_samples"):
                logger.log_samples(step, validation.samples)

    on_test_end = on_validation_end  # type: ignore[assignment]

    def _write(self, trainer: L.Trainer, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        append_line(self.run.metrics_file, {"step": step, **metrics})
        append_line(self.run.timing_file, {"step": step, **timing})
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, **timing}, step=step)


STATE = ("best_value", "best_step", "waited", "stopped_early", "pending", "micro_batch_plan")


class Checkpointer(Callback):
    """Saves at step boundaries, keeps the best, stops early, and saves before the run is stopped from outside.

    A checkpoint is `pending` where its step is not validated yet: the resumed run validates first.
    """

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        validation_steps: Sequence[int],
        requests: StopRequests,
        state: dict[str, Any],
        micro_batch_plan: dict[str, Any],
        seconds: Callable[[], float],
        command: str,
        report: Callable[[str], None],
    ) -> None:
        """The last of `validation_steps` is the run's last step; `state` is a checkpoint's, or empty."""
        self.directory, self.settings, self.requests = run.checkpoints, config.trainer, requests
        self.validation_steps, self.micro_batch_plan = validation_steps, micro_batch_plan
        self.seconds, self.command, self.report = seconds, command, report
        # Blank metrics are never better.
        self.patience = None if config.data.train_on is TrainOn.all else config.trainer.patience
        self.saved: int | None = None
        self.best_value: float | None = state.get("best_value")
        self.best_step: int | None = state.get("best_step")
        self.waited: int = state.get("waited", 0)
        self.stopped_early: bool = state.get("stopped_early", False)
        self.pending: bool = state.get("pending", False)
        self.loss_scale: dict[str, Any] | None = state.get("loss_scale")
        self.next_loss: float | None = state.get("next_loss")
        self.failed_in = "training"

    def state(self, trainer: L.Trainer, module: FineTuner, *, probe: bool = True) -> dict[str, Any]:
        """What a resumed run needs besides tensors; with `probe` also the next loss, which takes a forward pass."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return {
            **{name: getattr(self, name) for name in STATE},
            "seconds": self.seconds(),
            "skipped": list(module.skipped),
            "loss_scale": scaler.state_dict() if scaler is not None else None,
            "next_loss": self._next_loss(trainer, module) if probe else None,
        }

    @staticmethod
    def _next_loss(trainer: L.Trainer, module: FineTuner) -> float | None:
        """The loss of the next step's first row, by which a resumed run checks that its state is the saved one.

        None after the last step.
        """
        data = getattr(trainer, "datamodule", None)
        if data is None or module.step >= trainer.max_steps:
            return None
        loss = module.probe(data.first_row(module.step))
        return loss if math.isfinite(loss) else None

    # Requests are only noted; they are acted on at the end of the current step or batch.

    def on_sanity_check_start(self, *_: Any) -> None:
        """Installs the signal handlers, as before each loop."""
        self.requests.signals.take()

    on_test_start = on_sanity_check_start  # type: ignore[assignment]

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Installs the signal handlers for the training; restores the loss scale under fp16.

        Raises DivergedError where the model or the rows are not those of the checkpoint.
        """
        self.requests.signals.take()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and self.loss_scale:
            scaler.load_state_dict(self.loss_scale)
        trainer.should_stop = self.stopped_early
        saved, self.next_loss = self.next_loss, None
        loss = self._next_loss(trainer, module) if saved is not None else None
        if saved is None or loss is None:
            return
        difference = abs(loss - saved) / max(abs(saved), 0.1)
        losses = f"{saved:.6f} when it was saved and is {loss:.6f} now"
        message = f"after step {module.step} the next row's loss was {losses}"
        if difference > OTHER_RUN:
            raise DivergedError(
                f"{message}: this is not the model, data or adapter of the checkpoint; force=true starts the run again."
            )
        if difference > OTHER_MACHINE:
            self.report(f"warning: {message}; another device or version gives other numbers")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Saves where trainer.checkpoint_every or a request asks for it."""
        request, every = self._agree(trainer, module), self.settings.checkpoint_every
        self.pending = module.step in self.validation_steps
        if module.step >= self.validation_steps[-1]:
            trainer.should_stop = True  # after a validation, also where the last step is no multiple of its interval
        if request or (every is not None and module.step % every == 0 and not self.pending):
            self.save(trainer, module)
        self._act_on(request, trainer, module)

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Leaves a validation on a request to stop; its step is saved, and validated once the run is resumed."""
        request = self._agree(trainer, module)
        if request > SAVE:
            if module.step > 0:
                self.save(trainer, module)
            self._act_on(request, trainer, module)

    def on_test_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Leaves the test, which a resumed run repeats from its start."""
        self._act_on(self._agree(trainer, module), trainer, module)

    def _act_on(self, request: int, trainer: L.Trainer, module: FineTuner) -> None:
        """Ends the run on a request to stop; the caller has met a request to save."""
        if not request:
            return
        if trainer.is_global_zero:
            self.requests.run.clear_requests()
        if request == SAVE:
            if trainer.is_global_zero and self.saved == module.step:
                self.report(f"saved after step {module.step}, as the file SAVE asked")
            return
        where = f"saved after step {module.step} of {self.validation_steps[-1]}"
        if module.step == 0:
            where = "stopped before the first step"
        elif self.saved != module.step and trainer.is_global_zero:
            steps = steps_on_disk(self.directory)
            newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"
            where = f"stopped after step {module.step}, not saved; {newest}"
        message = f"{describe_request(request, self.seconds)}: {where}; the same command goes on from there"
        message += f": {self.command}" if self.command else "."
        raise Interrupted(message, request - SIGNAL) if request >= SIGNAL else Paused(message)

    def _agree(self, trainer: L.Trainer, module: Any) -> int:
        """The strongest request of any process, so that all of them stop at the same step; 0 for none."""
        own_request = self.requests.strongest()
        if trainer.world_size == 1:
            return own_request
        request = torch.tensor(own_request, device=module.device)
        torch.distributed.all_reduce(request, op=torch.distributed.ReduceOp.MAX)
        return int(request)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Compares with the best and saves; does nothing before training, where there is nothing to save."""
        monitor, metrics, sign = self.settings.monitor, module.validation.metrics, self.settings.mode.sign
        if monitor not in metrics:
            raise ConfigError(f"trainer.monitor={monitor}: no such metric{did_you_mean(monitor, metrics)}")
        if trainer.sanity_checking and not self.pending:
            return
        self.pending = False
        # NaN is never the best value.
        value = metrics[monitor]
        better = self.best_value is None or sign * value < sign * self.best_value
        if math.isfinite(value) and better:
            self.best_value, self.best_step, self.waited = value, module.step, 0
        else:
            self.waited += 1
            if self.patience is not None and self.waited >= self.patience:
                self.stopped_early = True
                trainer.should_stop = True
        self.save(trainer, module)
        self._act_on(self._agree(trainer, module), trainer, module)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Saves the last good state of a run that diverges or runs out of memory: the next start resumes there."""
        self.failed_in = "training" if trainer.training else "validation"
        # All processes diverge together, but others may have memory left: then they are not here.
        together = isinstance(exception, DivergedError) or (is_out_of_memory(exception) and trainer.world_size == 1)
        if together and trainer.training and not module.stepping and module.step > (self.saved or 0):
            module.skipped = [step for step in module.skipped if step <= module.step]
            release_tensors(exception, module)
            try:
                self.save(trainer, module, rescue=True)
            except DiskError as error:  # the original exception is raised
                self.report(f"warning: {error}")

    def save(self, trainer: L.Trainer, module: FineTuner, *, rescue: bool = False) -> None:
        """Writes a checkpoint in the first process, then deletes old ones.

        With `rescue`, when the training has failed, nothing is computed and nothing deleted.
        """
        weights, optimizer = module.weights(), module.optimizer_state()
        state = self.state(trainer, module, probe=not rescue)
        if not trainer.is_global_zero:
            return
        checkpoint = Checkpoint(module.step, weights, optimizer, state)
        try:
            save_checkpoint(self.directory, checkpoint)
        except OSError as error:
            earlier = steps_on_disk(self.directory)
            intact = f"the checkpoint of step {earlier[-1]} is intact" if earlier else "there is none before it"
            message = (
                f"the checkpoint of step {module.step} could not be written to {self.directory} ({error.strerror}); "
                f"{intact}"
            )
            if self.settings.on_save_error is OnSaveError.warn:
                self.report(f"warning: {message}; training goes on (trainer.on_save_error=warn).")
                return
            raise DiskError(f"{message}: free some space and run the same command.") from error
        self.saved = module.step
        if not rescue:
            prune(self.directory, self.settings.keep_checkpoints, self.best_step)


class ShowProgress(Callback):
    """Draws steps and validations on the screen of the first process."""

    def __init__(self, screen: Screen, recorder: Recorder, total_steps: int, show_rows: int, enabled: bool) -> None:
        self.screen, self.recorder, self.total_steps, self.show_rows = screen, recorder, total_steps, show_rows
        self.bar = StepProgress(screen, total_steps, enabled=enabled)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self.bar.start(module.step)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            self.bar.update(module.step, module.train_metrics["train/loss_nats"], self.recorder.tokens_per_s)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        validation: Validation = module.validation
        if not trainer.is_global_zero:
            return
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in validation.metrics.items())
        if module.trained_on_validation and validation.split == "val":
            numbers = "trained on all rows, so validations mean nothing"
        self.bar.screen.print(f"step {validation.step:>{len(str(self.total_steps))}}/{self.total_steps}  {numbers}")
        if validation.step == 0 or validation.step == self.total_steps:
            self.screen.samples(validation.samples, self.show_rows, validation.step)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Removes the bar; after an exception, before the error is printed."""
        self.bar.stop()

    on_exception = teardown  # type: ignore[assignment]
