"""One training from prepared rows to a finished run directory: its parts are built first, then it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch

from llmft.config.sections import Advantage, Export, OnNan, Precision, TrainOn, seconds_of
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, Interrupted, UserError
from llmft.core.machine import describe
from llmft.data.datamodule import DataModule
from llmft.metrics.show import show_summary
from llmft.model import adapters
from llmft.model.assemble import Assembled, assemble
from llmft.model.checkpointing import Offloaded, set_checkpointing
from llmft.model.compiling import compile_layers
from llmft.model.load import TORCH_DTYPES, first_line
from llmft.model.memory import optimizer_bytes
from llmft.model.value_head import add_value_head
from llmft.runs.checkpoint import Checkpoint, load_checkpoint, newest_sound, path_of, verify
from llmft.runs.predictions import PREFIX
from llmft.training.callbacks import Checkpointer, Recorder, count_from
from llmft.training.divergence import BadStep, write_bad_step
from llmft.training.finetuner import FineTuner
from llmft.training.micro_batching import MicroBatchPlan, architecture_of, divides_weights, plan_micro_batches
from llmft.training.out_of_memory import Held, OutOfMemory, is_out_of_memory
from llmft.training.parts import Parts, check_parts
from llmft.training.plan import show_plan, what_ran
from llmft.training.prepare import RunInputs, process_rank
from llmft.training.processes import is_lost_process
from llmft.training.progress import ShowProgress
from llmft.training.readiness import Ready, check_room, check_vocabulary, lightning_trainer, make_ready
from llmft.training.record import (
    before_and_after,
    chance_of,
    length_of,
    validated_at,
    words_of,
    write_predictions,
    write_records,
)
from llmft.training.references import GROUP, make_references
from llmft.training.reward_model import host_of
from llmft.training.rollouts import Rollouts, make_rollouts
from llmft.training.samples import decoder, make_generation
from llmft.training.schedule import make_schedule
from llmft.training.scoring import make_scoring
from llmft.training.stopping import Signals, StopRequests
from llmft.training.tracking import finish_loggers, make_loggers, summarise
from llmft.training.trial_reporter import ReportTrial, TrialReporter
from llmft.training.user_callbacks import failed_callback


def run_session(
    inputs: RunInputs, screen: Screen, reporter: TrialReporter | None = None, command: str = ""
) -> float | None:
    """Trains, or goes on training, and finishes the run directory; returns the monitored metric.

    `command` is the line that goes on with the run, for who interrupts it.
    """
    with ExitStack() as cleanup:
        session = build(inputs, screen, reporter, command, cleanup)
        session.fit()
        return session.finish()


def build(
    inputs: RunInputs, screen: Screen, reporter: TrialReporter | None, command: str, cleanup: ExitStack
) -> Session:
    """All parts of a run, in the order in which a mistake is cheapest; `cleanup` is told what to give back."""
    config, run = inputs.config, inputs.run
    parts = check_parts(config)
    ready = make_ready(inputs, parts, screen.warn)
    rows = ready.rows
    if ready.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ready.device)
    # Deterministic mode would also write NaN over all memory that is handed out, 8% of a step on a CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    assembled = _assemble(inputs, ready, screen.warn)
    cleanup.callback(assembled.release)
    main_process = process_rank(config) == 0
    checkpoint = newest_sound(run.checkpoints, screen.warn, mend=main_process)
    state = checkpoint.state if checkpoint is not None else {}
    plan = _plan_memory(inputs, ready, assembled, state.get("fit"), screen.warn)
    reused = {"base": assembled.reused, "tokens": sorted(rows.encoder.cached)}
    environment = {**describe(ready.device), "precision": ready.precision.value, "reused": reused}
    environment["micro_batch"] = plan.to_plain()
    environment["ran"] = what_ran(config, ready, assembled, plan)
    loggers: list[Any] = []
    if main_process:
        write_records(inputs, rows, ready.inspection.overlaps, environment)
        run.keep_until(checkpoint.step if checkpoint is not None else -1)
        show_plan(screen, inputs, ready, assembled, plan, checkpoint.step if checkpoint is not None else None)
        loggers = make_loggers(config, run, environment, screen)
        cleanup.push(partial(finish_loggers, loggers))
    references = make_references(inputs, ready, assembled.model, screen if main_process else None)
    signals = Signals()
    cleanup.callback(signals.release)
    data = DataModule(
        rows.splits,
        pad_id=rows.tokenizer.pad_token_id,
        seed=config.seed,
        batch_size=config.trainer.batch_size,
        micro_batch=plan.limit,
        validation_batch=GROUP if references else plan.validation(config.trainer.validation_batch_size),
        references=references,
    )
    rollouts = _rollouts(inputs, ready, assembled, plan, screen.print) if config.task.rollouts else None
    module = _module(inputs, parts, ready, assembled.model, screen.warn if main_process else None, rollouts)
    if rollouts is not None:
        rollouts.begin(assembled.model)
    data.position = lambda: module.step
    data.stops = [*range(rows.validate_every, rows.total_steps, rows.validate_every), rows.total_steps]
    if main_process:
        sizes = [p.numel() for p in assembled.model.parameters() if p.requires_grad]
        states = optimizer_bytes(config.optimizer, sizes)
        check_room(config, run.directory, 4 * sum(sizes), states, screen.warn)
    if checkpoint is not None:
        _restore(module, checkpoint, inputs)
    recorder = Recorder(
        run,
        seconds_before=state.get("seconds", 0.0),
        describe={
            "val": lambda row: rows.splits["validation"][row].where,
            "test": lambda row: rows.splits["test"][row].where,
        },
        columns=getattr(ready.objective, "columns", [f"{PREFIX}{label}" for label in inputs.labels]),
        groups={
            "val": lambda row: rows.splits["validation"][row].conversation.group,
            "test": lambda row: rows.splits["test"][row].conversation.group,
        },
    )
    limit = config.trainer.max_time
    deadline = None if limit is None else inputs.started + seconds_of(limit, "trainer.max_time")
    checkpointer = Checkpointer(
        run.checkpoints,
        every=config.trainer.checkpoint_every,
        keep=config.trainer.keep_checkpoints,
        monitor=config.trainer.monitor,
        mode=config.trainer.mode,
        # Blank metrics are never better.
        patience=None if config.data.train_on is TrainOn.all else config.trainer.patience,
        total_steps=rows.total_steps,
        stops=data.stops,
        requests=StopRequests(signals, run, deadline),
        state=state,
        fit=plan.to_plain(),
        seconds=lambda: recorder.seconds,
        command=command,
        on_save_error=config.trainer.on_save_error,
        tell=screen.print,
    )
    progress = ShowProgress(screen, recorder, rows.total_steps, config.task.show_rows, config.progress and main_process)
    callbacks: list[Any] = [recorder, checkpointer, progress]
    if reporter is not None:
        resumed_at = None if checkpoint is None else validated_at(run, checkpoint.step)
        callbacks.append(ReportTrial(reporter, rows.total_steps, lambda: recorder.tokens_per_s, resumed_at))
    trainer = lightning_trainer(
        config,
        ready.device,
        ready.precision,
        max_steps=rows.total_steps,
        val_check_interval=rows.validate_every,
        num_sanity_val_steps=-1 if checkpoint is None or checkpointer.pending else 0,
        logger=loggers or False,
        callbacks=[*callbacks, *parts.callbacks.values()],
    )
    count_from(trainer, module.step, data.steps_per_epoch)
    return Session(inputs, screen, parts, ready, plan, data, module, loggers, signals, recorder, checkpointer, trainer)


def _assemble(inputs: RunInputs, ready: Ready, warn: Callable[[str], None]) -> Assembled:
    config = inputs.config
    divided = divides_weights(config)  # whose parts go to the device when they are divided, layer by layer
    try:
        assembled = assemble(
            config,
            inputs.located,
            device=torch.device("cpu") if divided else ready.device,
            mapped=divided,
            precision=ready.precision,
            num_labels=inputs.num_outputs,
            vocabulary=len(ready.rows.tokenizer),
            pad_id=ready.rows.tokenizer.pad_token_id,
            threads=config.trainer.threads,
            keep=not config.trainer.compile,  # compiled layers stay compiled
            warn=warn,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory("loading", error) from error
        raise
    check_vocabulary(config, ready.rows, assembled.base.get_input_embeddings().weight.shape[0])
    if config.task.rollouts and config.task.advantage is Advantage.gae:
        add_value_head(assembled.model)
    return assembled


def _plan_memory(
    inputs: RunInputs,
    ready: Ready,
    assembled: Assembled,
    before: dict[str, Any] | None,
    warn: Callable[[str], None],
) -> MicroBatchPlan:
    """Chooses the micro-batch and what is kept of it, or takes what the checkpoint says (`before`)."""
    config = inputs.config
    plan = plan_micro_batches(
        config,
        ready.rows.splits["train"],
        lambda: architecture_of(inputs, len(ready.rows.tokenizer)),
        ready.device,
        TORCH_DTYPES[ready.precision] if config.lora.enabled else torch.float32,
        before=before,
    )
    set_checkpointing(assembled.base, plan.checkpointing)
    if config.trainer.compile:
        enabled = ready.precision is not Precision.fp32
        with torch.autocast(ready.device.type, TORCH_DTYPES[ready.precision], enabled):
            compile_layers(assembled.model, warn)
    return plan


def _rollouts(
    inputs: RunInputs, ready: Ready, assembled: Assembled, plan: MicroBatchPlan, tell: Callable[[str], None]
) -> Rollouts:
    rows, config = ready.rows, inputs.config
    return make_rollouts(
        config,
        inputs.run,
        rows.splits["train"],
        rows.encoder,
        ready.objective,
        host_of(assembled.model, config, inputs.located.fingerprint),
        tell,
        decode=decoder(rows.tokenizer, [*config.prompt.stop, rows.ends.text]),
        micro_batch=plan.limit,
        pad_id=rows.tokenizer.pad_token_id,
        context_tokens=rows.context_tokens,
    )


def _module(
    inputs: RunInputs,
    parts: Parts,
    ready: Ready,
    model: Any,
    warn: Callable[[str], None] | None,
    rollouts: Rollouts | None,
) -> FineTuner:
    """The LightningModule; `warn` is told of skipped steps, None in all processes but the first."""
    config, rows = inputs.config, ready.rows
    train, skips = rows.splits["train"], config.trainer.on_nan is OnNan.skip

    def keep_bad_step(bad: BadStep) -> str:
        if warn is None:
            return ""
        path = write_bad_step(inputs.run, bad, train, rows.tokenizer)
        if skips:
            warn(f"{bad.reason} at step {bad.step}, which is skipped; its rows are in {path}.")
        return str(path)

    def note_not_deterministic(operation: str) -> None:
        if warn is not None:
            inputs.run.update(not_deterministic=operation)
            warn(
                f"trainer.deterministic: {operation} has no deterministic form here, so that a resumed or repeated run "
                "may differ in the last bits."
            )

    judged = rollouts.judge if rollouts is not None else None
    # The CPU's activations are in its memory already.
    offloads = config.trainer.offload_activations and ready.device.type == "cuda"
    return FineTuner(
        model,
        ready.objective,
        parts.make_optimizer,
        make_schedule(config.learning_rate, rows.total_steps),
        seed=config.seed,
        gradient_clip=config.trainer.gradient_clip,
        generation=make_generation(config, rows, parts.metrics, "validation", judged),
        scoring=make_scoring(config.task, parts.metrics, rows.splits, config.data.degrees),
        trained_on_validation=config.data.train_on is TrainOn.all,
        describe_row=lambda row: train[row].where,
        keep_bad_step=keep_bad_step,
        skip_up_to=rows.total_steps if skips else None,
        keeping=partial(Offloaded, model) if offloads else nullcontext,
        tells_steps=bool(config.trainer.callbacks),
        strict=config.trainer.deterministic,
        tell_not_deterministic=note_not_deterministic,
        rollouts=rollouts,
    )


def _restore(module: FineTuner, checkpoint: Checkpoint, inputs: RunInputs) -> None:
    try:
        module.restore(checkpoint.step, checkpoint.weights, checkpoint.optimizer)
        module.skipped = list(checkpoint.state.get("skipped", []))
    except (KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{inputs.run.checkpoints}: the checkpoint of step {checkpoint.step} does not fit this model "
            f"({str(error)[:200]}); force=true starts the run again."
        ) from None


@dataclass
class Session:
    """A training whose parts are built."""

    inputs: RunInputs
    screen: Screen
    parts: Parts
    ready: Ready
    plan: MicroBatchPlan
    data: DataModule
    module: FineTuner
    loggers: list[Any]
    signals: Signals
    recorder: Recorder
    checkpointer: Checkpointer
    trainer: L.Trainer

    def fit(self) -> None:
        """Takes the steps that are left."""
        total_steps = self.ready.rows.total_steps
        finished = self.module.step >= total_steps or self.checkpointer.stopped_early
        if finished and not self.checkpointer.pending:
            return
        self._guarded(self.trainer.fit)
        if self.module.step < total_steps:
            trainer = self.inputs.config.trainer
            reason = f"trainer.patience={trainer.patience} validations without a better {trainer.monitor}"
            reason = reason if self.checkpointer.stopped_early else "a callback of trainer.callbacks asked for it"
            self.screen.print(f"stopped early after step {self.module.step} of {total_steps}: {reason}.")

    def _guarded(self, loop: Callable[..., Any], **arguments: Any) -> None:
        """Runs a loop of Lightning's; its own way of ending on a signal, `exit(1)`, becomes ours."""
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
            if self.trainer.world_size > 1 and is_lost_process(error):
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
        """With what was at most computed at once, so that half of it is less."""
        stage, lengths = self.checkpointer.failed_in, self.ready.rows.splits["train"].lengths
        if stage == "training":
            step = self.data.groups_of_step(self.module.step)
            largest = max((group for share in step for group in share), key=lambda group: int(lengths[group].sum()))
            return OutOfMemory(stage, error, Held(len(largest), int(lengths[largest].sum()), self.plan))
        sizes = [len(group) for split in ("validation", "test") for group in self.data.groups_of(split)]
        generated = len(self.module.generation.samples) if self.module.generation is not None else 0
        return OutOfMemory(stage, error, Held(max(*sizes, generated), 0, self.plan))

    def finish(self) -> float | None:
        """Tests, hands over weights and predictions, writes the result; returns the monitored metric."""
        config, run, module, rows = self.inputs.config, self.inputs.run, self.module, self.ready.rows
        main_process = process_rank(config) == 0
        step = self._take_best() if config.trainer.export is Export.best else module.step
        if main_process:
            run.keep_until(module.step)
        if rows.splits.get("test"):
            judged = module.rollouts.judge if isinstance(module.rollouts, Rollouts) else None
            module.generation = make_generation(config, rows, self.parts.metrics, "test", judged)
            self._guarded(self.trainer.test, verbose=False)
        weights = adapters.whole_state(module.model, trained_only=config.lora.enabled)
        if not main_process:
            return None
        directory = run.adapter if config.lora.enabled else run.model
        rows.tokenizer.chat_template = rows.prompt.config.template
        adapters.save(module.model, rows.tokenizer, directory, weights)
        write_predictions(self.inputs, rows.splits, step)
        before, after = before_and_after(run, step)
        result = {
            "before": before,
            "after": after,
            "step": step,
            "steps": module.step,
            "stopped_early": self.checkpointer.stopped_early or module.step < rows.total_steps,
            "seconds": round(self.recorder.seconds, 3),
        }
        length = length_of(self.inputs, step)
        words = words_of(config, before, after, length)
        chance = chance_of(self.inputs, module.scoring.metrics if module.scoring is not None else {})
        more = {"words": words, "length": length, "chance": chance, "skipped_steps": module.skipped}
        result |= {name: value for name, value in more.items() if value}
        run.finish(result)
        summarise(self.loggers, {**{f"best/{name}": value for name, value in after.items()}, "best/step": step})
        facts = {
            "weights": f"{directory} (step {step} of {rows.total_steps}, {config.trainer.export.value})",
            "time": f"{self.recorder.seconds:.1f} s in training and validation",
            **({"talk to it": f"python -m llmft.chat run={run.directory}"} if config.task.writes else {}),
        }
        show_summary(self.screen, before, after, facts, chance, words, blank=config.data.train_on is TrainOn.all)
        return after.get(config.trainer.monitor)

    def _take_best(self) -> int:
        """Puts the best checkpoint's weights back; the last ones stay where that file is damaged."""
        config, best, last = self.inputs.config, self.checkpointer.best_step, self.module.step
        if best is None and config.data.train_on is not TrainOn.all:
            self.screen.warn(
                f"no validation had a finite {config.trainer.monitor}, so none is the best: the last weights are "
                "handed over."
            )
        if best is None or best == last:
            return last
        path = path_of(self.inputs.run.checkpoints, best)
        damage = verify(path)
        if damage is not None:
            self.screen.warn(f"the best checkpoint (step {best}) is damaged ({damage}); the last weights are taken.")
            return last
        adapters.load_trainable_state(self.module.model, load_checkpoint(path).weights)
        return best
