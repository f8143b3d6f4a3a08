"""One training from prepared rows to a finished run directory: builds its parts, then runs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from llmft.config.data import TrainOn
from llmft.config.fields import seconds_of
from llmft.config.task import Advantage
from llmft.config.trainer import Export
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, Interrupted, UserError, first_line
from llmft.core.machine import describe
from llmft.data.datamodule import DataModule
from llmft.metrics.show import show_summary
from llmft.model import adapters
from llmft.model.assemble import Assembled, assemble
from llmft.model.checkpointing import set_checkpointing
from llmft.model.compiling import compile_layers
from llmft.model.device import TORCH_DTYPES, mixed_precision
from llmft.model.memory import optimizer_bytes
from llmft.model.value_head import add_value_head
from llmft.runs.checkpoint import load_checkpoint, newest_sound, path_of, verify
from llmft.runs.predictions import PREFIX
from llmft.training import record
from llmft.training.callbacks import Checkpointer, Recorder, ShowProgress, count_from
from llmft.training.finetuner import FineTuner
from llmft.training.micro_batching import MicroBatchPlan, architecture_of, divides_weights, plan_micro_batches
from llmft.training.out_of_memory import OutOfMemory, is_out_of_memory
from llmft.training.parts import check_parts, failed_callback
from llmft.training.plan import show_plan, what_ran
from llmft.training.prepare import RunInputs, process_rank
from llmft.training.readiness import check_readiness, check_room, check_vocabulary, lightning_trainer
from llmft.training.references import GROUP, make_references
from llmft.training.rollouts import Rollouts
from llmft.training.stopping import Signals, StopRequests
from llmft.training.tracking import finish_loggers, make_loggers, summarise
from llmft.training.trial_reporter import ReportTrial, TrialReporter

LOST_PROCESS = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "socket")
"""Words of untyped errors that mean that another process of the run no longer answers."""


def run_session(inputs: RunInputs, screen: Screen, reporter: TrialReporter | None, command: str) -> float | None:
    """Trains, or resumes training, and finishes the run directory; returns the monitored metric.

    `command` is the command line that resumes the run, shown where it is interrupted.
    """
    with ExitStack() as cleanup:
        session = Session(inputs, screen, reporter, command, cleanup)
        session.fit()
        return session.finish()


class Session:
    """A training: its parts are built, those that find mistakes fastest first, then it runs.

    Releases are registered on `cleanup`.
    """

    def __init__(
        self, inputs: RunInputs, screen: Screen, reporter: TrialReporter | None, command: str, cleanup: ExitStack
    ) -> None:
        self.inputs, self.config, self.run, self.screen = inputs, inputs.config, inputs.run, screen
        self.main_process = process_rank(self.config) == 0
        mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        cleanup.callback(torch.use_deterministic_algorithms, mode[0], warn_only=mode[1])  # Lightning leaves its own
        self.parts = check_parts(self.config)
        self.ready = check_readiness(inputs, self.parts, screen.warn)
        self.tokenized = self.ready.rows
        if self.ready.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ready.device)
        # Deterministic mode would also fill all allocated memory with NaN, 8% of a step on a CPU.
        fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        cleanup.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", fills)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        assembled = self._assemble()
        cleanup.callback(assembled.release)
        self.checkpoint = newest_sound(self.run.checkpoints, screen.warn, mend=self.main_process)
        self.state = self.checkpoint.state if self.checkpoint is not None else {}
        self.plan = self._plan_memory(assembled)
        self.loggers: list[Any] = []
        if self.main_process:
            self._record(assembled, None if self.checkpoint is None else self.checkpoint.step)
            cleanup.push(partial(finish_loggers, self.loggers))
        self.signals = Signals()
        cleanup.callback(self.signals.release)
        self.data = self._data(assembled.model)
        self.module = self._module(assembled.model)
        self._make_trainer(reporter, command)

    def _assemble(self) -> Assembled:
        config, ready = self.config, self.ready
        divided = divides_weights(config)  # sharded weights go to the device layer by layer
        try:
            assembled = assemble(
                config,
                self.inputs.located,
                device=torch.device("cpu") if divided else ready.device,
                memory_map=divided,
                precision=ready.precision,
                num_labels=self.inputs.num_outputs,
                vocabulary=len(self.tokenized.tokenizer),
                pad_id=self.tokenized.tokenizer.pad_token_id,
                threads=config.trainer.threads,
                keep_base=not config.trainer.compile,  # compiled layers stay compiled
                warn=self.screen.warn,
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory("loading", error) from error
            raise
        check_vocabulary(config, self.tokenized, assembled.base.get_input_embeddings().weight.shape[0])
        if config.task.rollouts and config.task.advantage is Advantage.gae:
            add_value_head(assembled.model)
        return assembled

    def _plan_memory(self, assembled: Assembled) -> MicroBatchPlan:
        """Chooses micro-batch and gradient checkpointing, or takes the checkpoint's."""
        config, device, dtype = self.config, self.ready.device, TORCH_DTYPES[self.ready.precision]
        plan = plan_micro_batches(
            config,
            self.tokenized.splits["train"],
            lambda: architecture_of(self.inputs, len(self.tokenized.tokenizer)),
            device,
            dtype if config.lora.enabled else torch.float32,
            saved=self.state.get("micro_batch_plan", self.state.get("fit")),  # "fit": in older checkpoints
        )
        set_checkpointing(assembled.base, plan.checkpointing)
        if config.trainer.compile:
            with mixed_precision(device, self.ready.precision):
                compile_layers(assembled.model, self.screen.warn)
        return plan

    def _record(self, assembled: Assembled, resumed_at: int | None) -> None:
        """Writes the run's records, shows the plan, and opens the loggers."""
        ready, run = self.ready, self.run
        environment = {
            **describe(ready.device),
            "precision": ready.precision.value,
            "reused": {"base": assembled.reused, "tokens": sorted(self.tokenized.encoder.cached)},
            "micro_batch": self.plan.to_plain(),
            "ran": what_ran(self.config, ready, assembled, self.plan),
        }
        record.write_records(self.inputs, environment, self.tokenized, ready.inspection.overlaps)
        run.truncate_records(-1 if resumed_at is None else resumed_at)
        show_plan(self.screen, self.inputs, ready, assembled, self.plan, resumed_at)
        self.loggers += make_loggers(self.config, run, environment, self.screen)

    def _data(self, model: Any) -> DataModule:
        config, tokenized = self.config, self.tokenized
        references = make_references(self.inputs, self.ready, model, self.screen if self.main_process else None)
        data = DataModule(
            tokenized.splits,
            pad_id=tokenized.tokenizer.pad_token_id,
            seed=config.seed,
            batch_size=config.trainer.batch_size,
            micro_batch=self.plan.limit,
            validation_batch=GROUP if references else self.plan.validation(config.trainer.validation_batch_size),
            references=references,
        )
        data.current_step = lambda: self.module.step
        every, total_steps = tokenized.validate_every, tokenized.total_steps
        data.validation_steps = [*range(every, total_steps, every), total_steps]
        return data

    def _module(self, model: Any) -> FineTuner:
        """The LightningModule in the checkpoint's state. Raises DiskError where its checkpoints will not fit."""
        config, run, warn, checkpoint = self.config, self.run, self.screen.warn, self.checkpoint
        rollouts = None
        if config.task.rollouts:
            limit, report = self.plan.limit, self.screen.print
            rollouts = Rollouts(self.inputs, self.tokenized, self.ready.objective, model, limit, report)
        module = FineTuner(self.inputs, self.ready, self.parts, model, rollouts, warn if self.main_process else None)
        if self.main_process:
            sizes = [p.numel() for p in model.parameters() if p.requires_grad]
            check_room(config, run.directory, 4 * sum(sizes), optimizer_bytes(config.optimizer, sizes), warn)
        if checkpoint is not None:
            try:
                module.restore(checkpoint.step, checkpoint.weights, checkpoint.optimizer)
                module.skipped = list(checkpoint.state.get("skipped", []))
            except (KeyError, RuntimeError) as error:
                raise ConfigError(
                    f"{run.checkpoints}: the checkpoint of step {checkpoint.step} does not fit this model "
                    f"({str(error)[:200]}); force=true starts the run again."
                ) from None
        return module

    def _make_trainer(self, reporter: TrialReporter | None, command: str) -> None:
        """Makes Lightning's trainer, with the callbacks that record, save, show and report."""
        config, tokenized, screen, state = self.config, self.tokenized, self.screen, self.state
        checkpoint = self.checkpoint
        columns = getattr(self.ready.objective, "columns", [f"{PREFIX}{label}" for label in self.inputs.labels])
        self.recorder = recorder = Recorder(self.run, tokenized.splits, columns, state.get("seconds", 0.0))
        limit = config.trainer.max_time
        deadline = None if limit is None else self.inputs.started + seconds_of(limit, "trainer.max_time")
        self.checkpointer = Checkpointer(
            self.run,
            config,
            self.data.validation_steps,
            StopRequests(self.signals, self.run, deadline),
            state,
            micro_batch_plan=self.plan.to_plain(),
            seconds=lambda: recorder.seconds,
            command=command,
            report=screen.print,
        )
        bar = config.progress and self.main_process
        progress = ShowProgress(screen, recorder, tokenized.total_steps, config.task.show_rows, bar)
        callbacks: list[Any] = [recorder, self.checkpointer, progress]
        if reporter is not None:
            resumed_at = None if checkpoint is None else record.validated_at(self.run, checkpoint.step)
            callbacks.append(ReportTrial(reporter, tokenized.total_steps, lambda: recorder.tokens_per_s, resumed_at))
        self.trainer = lightning_trainer(
            config,
            self.ready.device,
            self.ready.precision,
            max_steps=tokenized.total_steps,
            val_check_interval=tokenized.validate_every,
            num_sanity_val_steps=-1 if checkpoint is None or self.checkpointer.pending else 0,
            logger=self.loggers or False,
            callbacks=[*callbacks, *self.parts.callbacks.values()],
        )
        count_from(self.trainer, self.module.step, self.data.steps_per_epoch)

    def fit(self) -> None:
        """Takes the remaining steps."""
        total_steps = self.tokenized.total_steps
        finished = self.module.step >= total_steps or self.checkpointer.stopped_early
        if finished and not self.checkpointer.pending:
            return
        self._guarded(self.trainer.fit)
        if self.module.step < total_steps:
            trainer, reason = self.config.trainer, "a callback of trainer.callbacks asked for it"
            if self.checkpointer.stopped_early:
                reason = f"trainer.patience={trainer.patience} validations without a better {trainer.monitor}"
            self.screen.print(f"stopped early after step {self.module.step} of {total_steps}: {reason}.")

    def _guarded(self, loop: Callable[..., Any], **arguments: Any) -> None:
        """Runs a loop of Lightning's. Turns Lightning's exit(1) on a signal into Interrupted."""
        self.signals.take()
        try:
            loop(self.module, datamodule=self.data, **arguments)
        except SystemExit as error:
            if not self.signals.received:
                raise UserError(
                    f"something called sys.exit({error.code}) in the training; there is no result."
                ) from None
            message = "interrupted; the same command goes on from the newest checkpoint."
            raise Interrupted(message, self.signals.received) from error
        except Exception as error:
            if (failure := failed_callback(error, self.parts.callbacks)) is not None:
                raise failure from error
            lost = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST_PROCESS)
            if self.trainer.world_size > 1 and (lost or isinstance(error, torch.distributed.DistError)):
                raise UserError(
                    f"another process of this run is gone ({first_line(error)}); the same command goes on from the "
                    "newest checkpoint."
                ) from error
            if not is_out_of_memory(error):
                raise
            if self.trainer.world_size > 1:  # the other processes cannot follow
                raise ConfigError(
                    f"out of memory in {self.checkpointer.failed_in} ({error}); halve "
                    f"trainer.micro_batch={self.plan.limit}."
                ) from error
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: BaseException) -> OutOfMemory:
        """The error with the largest rows and tokens that were computed at once, so that half of them is less."""
        stage, lengths = self.checkpointer.failed_in, self.tokenized.splits["train"].lengths
        if stage == "training":
            step = self.data.groups_of_step(self.module.step)
            largest = max((group for groups in step for group in groups), key=lambda group: int(lengths[group].sum()))
            return OutOfMemory(stage, error, self.plan, len(largest), int(lengths[largest].sum()))
        sizes = [len(group) for split in ("validation", "test") for group in self.data.groups_of(split)]
        generated = len(self.module.generation.samples) if self.module.generation is not None else 0
        return OutOfMemory(stage, error, self.plan, max(*sizes, generated))

    def finish(self) -> float | None:
        """Tests, exports weights and predictions, writes the result; returns the monitored metric."""
        config, run, module, tokenized = self.config, self.run, self.module, self.tokenized
        step = self._take_best() if config.trainer.export is Export.best else module.step
        if self.main_process:
            run.truncate_records(module.step)
        if tokenized.splits.get("test"):
            module.generate_for("test")
            self._guarded(self.trainer.test, verbose=False)
        weights = adapters.full_state(module.model, trained_only=config.lora.enabled)
        if not self.main_process:
            return None
        directory = run.adapter if config.lora.enabled else run.model
        tokenized.tokenizer.chat_template = tokenized.prompt.config.template
        adapters.save(module.model, tokenized.tokenizer, directory, weights)
        record.write_predictions(self.inputs, tokenized.splits, step)
        metrics = module.scoring.metrics if module.scoring is not None else {}
        result = record.result_of(self.inputs, step, metrics)
        result |= {
            "step": step,
            "steps": module.step,
            "stopped_early": self.checkpointer.stopped_early or module.step < tokenized.total_steps,
            "seconds": round(self.recorder.seconds, 3),
            **({"skipped_steps": module.skipped} if module.skipped else {}),
        }
        run.finish(result)
        before, after = result["before"], result["after"]
        summarise(self.loggers, {**{f"best/{name}": value for name, value in after.items()}, "best/step": step})
        facts = {
            "weights": f"{directory} (step {step} of {tokenized.total_steps}, {config.trainer.export.value})",
            "time": f"{self.recorder.seconds:.1f} s in training and validation",
            **({"talk to it": f"python -m llmft.chat run={run.directory}"} if config.task.writes else {}),
        }
        blank, notes = config.data.train_on is TrainOn.all, result.get("words", [])
        show_summary(self.screen, before, after, facts, result.get("chance", {}), notes, blank=blank)
        return after.get(config.trainer.monitor)  # type: ignore[no-any-return]

    def _take_best(self) -> int:
        """Loads the best checkpoint's weights and returns its step; keeps the last ones where that file is damaged."""
        config, best, last = self.config, self.checkpointer.best_step, self.module.step
        if best is None and config.data.train_on is not TrainOn.all:
            self.screen.warn(
                f"no validation had a finite {config.trainer.monitor}, so none is the best: the last weights are "
                "exported."
            )
        if best is None or best == last:
            return last
        path = path_of(self.run.checkpoints, best)
        damage = verify(path)
        if damage is not None:
            self.screen.warn(f"the best checkpoint (step {best}) is damaged ({damage}); the last weights are taken.")
            return last
        adapters.load_trainable_state(self.module.model, load_checkpoint(path).weights)
        return best
