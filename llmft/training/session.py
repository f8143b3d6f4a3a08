"""One training from prepared rows to a finished run directory."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch

from llmft.config.hydra_app import command_line
from llmft.config.instantiate import build, check_target, find, metric_functions, optimizer_factory
from llmft.config.sections import (
    Checkpointing,
    Export,
    Head,
    Mode,
    OnNan,
    TaskConfig,
    TrainConfig,
    TrainOn,
    seconds_of,
)
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, Interrupted, UserError, did_you_mean
from llmft.core.machine import describe, sensible_threads
from llmft.data.datamodule import DataModule
from llmft.data.examples import Examples
from llmft.metrics.monitor import mode_of, validation_metrics, with_mode
from llmft.model import adapters
from llmft.model.checkpointing import Offloaded, set_checkpointing
from llmft.model.compiling import compile_layers
from llmft.model.heads import renew_head
from llmft.model.load import (
    TORCH_DTYPES,
    drop_base,
    kept_base,
    load_base,
)
from llmft.model.memory import optimizer_bytes
from llmft.model.quantization import held_as, weight_counts
from llmft.model.sharding import is_sharded
from llmft.runs.checkpoint import load_checkpoint, newest_sound, path_of, verify
from llmft.training.callbacks import Checkpointer, Recorder, count_from
from llmft.training.divergence import BadStep, write_bad_step
from llmft.training.finetuner import FineTuner, stream
from llmft.training.micro_batching import architecture_of, plan_micro_batches
from llmft.training.objectives.choice import cost
from llmft.training.out_of_memory import Held, OutOfMemory, is_out_of_memory
from llmft.training.plan import last_names, plan_facts
from llmft.training.prepare import Prepared, process_rank
from llmft.training.progress import ShowProgress
from llmft.training.readiness import check_dora, check_room, check_vocabulary, lightning_trainer, make_ready
from llmft.training.record import before_and_after, chance_of, validated_at, write_predictions, write_records
from llmft.training.samples import make_generation
from llmft.training.schedule import make_schedule
from llmft.training.scoring import check_objective, make_scoring
from llmft.training.stopping import Signals, Wishes
from llmft.training.tracking import SafeWandbLogger, check_loggers, make_loggers
from llmft.training.user_callbacks import check_callbacks, failed_callback
from llmft.training.watch import Watch, Watched


@dataclass
class Parts:
    """What the config names and others wrote, or a task brings."""

    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    metrics: dict[str, Callable[..., float]]
    callbacks: dict[str, Any]


def check_parts(config: TrainConfig) -> Parts:
    """Builds what needs neither rows nor weights; raises ConfigError naming the key of a part that cannot be."""
    with_mode(config)
    check_loggers(config.logger)
    metrics = metric_functions(config.task.metrics, config.task.metric_options)
    for metric in metrics.values() if config.task.generate_rows else ():
        # An encoder that is missing is told before the weights load, not after.
        ready = getattr(getattr(metric, "func", metric), "ready", None)
        if ready is not None:
            ready(**getattr(metric, "keywords", {}))
    check_objective(config.task)
    if isinstance(config.trainer.strategy, dict):
        check_target(config.trainer.strategy, "trainer.strategy", "strategy")
    return Parts(
        optimizer_factory(config.optimizer, config.learning_rate.peak),
        metrics,
        check_callbacks(
            config,
            {n: _callback(node, f"trainer.callbacks.{n}", config.task) for n, node in config.trainer.callbacks.items()},
        ),
    )


def _callback(node: dict[str, Any], key: str, task: TaskConfig) -> Any:
    """A callback of Lightning's; one that monitors a metric gets that metric's direction, or is refused."""
    check_target(node, key, "callback")
    monitor, metrics = node.get("monitor"), validation_metrics(task)
    if isinstance(monitor, str) and monitor.startswith("val/"):
        if monitor not in metrics:
            raise ConfigError(f"{key}.monitor={monitor}: no such metric{did_you_mean(monitor, metrics)}")
        takes = inspect.signature(find(str(node.get("_target_")), f"{key}._target_", "callback")).parameters
        if "mode" in takes and node.get("mode", "auto") in ("auto", "min", "max"):
            asked = Mode(node.get("mode", "auto"))
            node = {**node, "mode": mode_of(metrics[monitor], monitor, asked, key=f"{key}.mode").value}
    return build(node, key, "callback")


class Session:
    """Builds all parts of a run, in the order in which a mistake is cheapest, and runs it."""

    def __init__(self, prepared: Prepared, screen: Screen, watch: Watch | None = None) -> None:
        self.prepared = prepared
        self.watch = watch
        self.config: TrainConfig = prepared.config
        self.screen = screen
        self.run_directory = prepared.run
        self.main_process = process_rank(self.config) == 0
        self.loggers: list[Any] = []
        self.exit_code = 1
        self.signals = Signals()
        self.model: Any = None
        self.loaded: Any = None

    # ---------------------------------------------------------------------------------------------------- building

    def run(self) -> float | None:
        """Trains, or goes on training, and finishes the run directory; returns the monitored metric."""
        config = self.config
        self.parts = check_parts(config)
        self._ready()
        try:
            self._load()
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory("loading", error) from error
            raise
        checkpoint = newest_sound(self.run_directory.checkpoints, self.screen.warn, mend=self.main_process)
        state = checkpoint.state if checkpoint is not None else {}
        self._fit_memory(state.get("fit"))
        reused = {"base": self.base_reused, "tokens": sorted(self.encoder.cached)}
        environment = {**describe(self.device), "precision": self.precision.value, "reused": reused}
        environment["micro_batch"] = self.fit.to_plain()
        environment["ran"] = self._ran()
        if self.main_process:
            write_records(self.prepared, self.rows, self.inspection.overlaps, environment)
            self.run_directory.keep_until(checkpoint.step if checkpoint is not None else -1)
            self._show_plan(checkpoint.step if checkpoint is not None else None)
            self.loggers = make_loggers(config, self.run_directory, environment, self.screen)
        self.module = self._module()
        if self.main_process:
            sizes = [p.numel() for p in self.model.parameters() if p.requires_grad]
            states = optimizer_bytes(config.optimizer, sizes)
            check_room(config, self.run_directory.directory, 4 * sum(sizes), states, self.screen.warn)
        if checkpoint is not None:
            try:
                self.module.restore(checkpoint.step, checkpoint.weights, checkpoint.optimizer)
                self.module.skipped = list(state.get("skipped", []))
            except (KeyError, RuntimeError) as error:
                raise ConfigError(
                    f"{self.run_directory.checkpoints}: the checkpoint of step {checkpoint.step} does not fit this "
                    f"model ({str(error)[:200]}); force=true starts the run again."
                ) from None
        recorder = Recorder(
            self.run_directory,
            seconds_before=state.get("seconds", 0.0),
            describe={
                "val": lambda row: self.splits["validation"][row].where,
                "test": lambda row: self.splits["test"][row].where,
            },
            labels=self.prepared.labels,
        )
        self.checkpointer = self._checkpointer(state, recorder)
        progress = ShowProgress(
            self.screen, recorder, self.total_steps, config.task.show_rows, config.progress and self.main_process
        )
        first_validates = checkpoint is None or self.checkpointer.pending
        callbacks: list[Any] = [recorder, self.checkpointer, progress]
        if self.watch is not None:
            resumed_at = None if checkpoint is None else validated_at(self.run_directory, checkpoint.step)
            callbacks.append(Watched(self.watch, self.total_steps, lambda: recorder.tokens_per_s, resumed_at))
        trainer = self._trainer(callbacks, first_validates)
        self._fit(trainer)
        return self._finish(trainer, recorder)

    def _ready(self) -> None:
        """Device, tokenizer and token ids: everything before the weights load."""
        ready = make_ready(self.prepared, self.parts, self.screen.warn)
        self.device, self.precision, self.rows = ready.device, ready.precision, ready.rows
        self.inspection, self.objective = ready.inspection, ready.objective
        self.tokenizer, self.prompt, self.encoder = self.rows.tokenizer, self.rows.prompt, self.rows.encoder
        self.splits: dict[str, Examples] = self.rows.splits
        self.total_steps, self.validate_every = self.rows.total_steps, self.rows.validate_every
        torch.set_float32_matmul_precision("high")
        # Deterministic mode would also write NaN over all memory that is handed out, 8% of a step on a CPU.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def _set_threads(self, num_weights: int) -> None:
        """As configured, or as many as the model can use."""
        trainer = self.config.trainer
        processes = trainer.devices if self.device.type == "cpu" and isinstance(trainer.devices, int) else 1
        torch.set_num_threads(trainer.threads or sensible_threads(num_weights, processes))

    @property
    def _keeps_base(self) -> bool:
        """Whether the next run of this process may have the base; compiled layers stay compiled."""
        return adapters.reusable(self.config.lora) and not self.config.trainer.compile

    def _load(self) -> None:
        """The base, quantised, and what is trained on it."""
        config = self.config
        dtype = TORCH_DTYPES[self.precision] if config.lora.enabled else torch.float32
        kept = kept_base()
        self.base = load_base(
            config.model,
            self.prepared.located,
            config.quantization,
            auto_class=str(config.task.auto_class),
            num_labels=len(self.prepared.labels),
            dtype=dtype,
            device=self.device,
            seed=config.seed,
            vocab_size=len(self.tokenizer) if config.model.train_tokenizer_vocab else None,
            keep=self._keeps_base,
            warn=self.screen.warn,
        )
        self.base_reused = self.base is kept
        self.loaded = self.base
        if config.task.head is Head.linear:
            renew_head(self.base, stream(config.seed, "head"))
        counts = weight_counts(self.base)
        self._set_threads(counts["4-bit"] + counts["8-bit"] + counts["full"])
        check_dora(config, self.device, int8=counts["8-bit"] > 0)
        check_vocabulary(config, self.rows, self.base.get_input_embeddings().weight.shape[0])
        self.base.config.pad_token_id = self.tokenizer.pad_token_id
        set_checkpointing(self.base, Checkpointing.none)  # PEFT would have the embeddings' output differentiated
        if config.lora.enabled:
            self.model = adapters.attach(
                self.base,
                config.lora,
                auto_class=str(config.task.auto_class),
                seed=stream(config.seed, "lora"),
                name=str(self.prepared.located.directory) if config.model.path is not None else config.model.id,
                kernels=config.model.kernels,
            )
        else:
            self.base.requires_grad_(True)
            self.model = self.base

    def _fit_memory(self, before: dict[str, Any] | None) -> None:
        """Chooses the micro-batch and what is kept of it, or takes what the checkpoint says."""
        config = self.config
        dtype = TORCH_DTYPES[self.precision] if config.lora.enabled else torch.float32
        self.fit = plan_micro_batches(
            config,
            self.splits["train"],
            lambda: architecture_of(self.prepared, len(self.tokenizer)),
            self.device,
            dtype,
            before=before,
        )
        set_checkpointing(self.base, self.fit.checkpointing)
        if config.trainer.compile:
            compile_layers(self.model, self.screen.warn)

    def _module(self) -> FineTuner:
        config = self.config
        train = self.splits["train"]
        self.data = DataModule(
            self.splits,
            pad_id=self.tokenizer.pad_token_id,
            seed=config.seed,
            batch_size=config.trainer.batch_size,
            micro_batch=self.fit.limit,
            validation_batch=self.fit.validation(config.trainer.validation_batch_size),
        )
        module = FineTuner(
            self.model,
            self.objective,
            self.parts.make_optimizer,
            make_schedule(config.learning_rate, self.total_steps),
            seed=config.seed,
            gradient_clip=config.trainer.gradient_clip,
            generation=make_generation(config, self.rows, self.parts.metrics, "validation"),
            scoring=make_scoring(config.task, self.parts.metrics, self.splits),
            trained_on_validation=config.data.train_on is TrainOn.all,
            describe_row=lambda row: train[row].where,
            keep_bad_step=self._keep_bad_step,
            skip_up_to=self.total_steps if config.trainer.on_nan is OnNan.skip else None,
            keeping=partial(Offloaded, self.model) if self._offloads() else nullcontext,
            tells_steps=bool(config.trainer.callbacks),
        )
        self.data.position = lambda: module.step
        self.data.stops = [*range(self.validate_every, self.total_steps, self.validate_every), self.total_steps]
        return module

    def _offloads(self) -> bool:
        """The CPU's activations are in its memory already."""
        return self.config.trainer.offload_activations and self.device.type == "cuda"

    def _keep_bad_step(self, bad: BadStep) -> str:
        if not self.main_process:
            return ""
        path = write_bad_step(self.run_directory, bad, self.splits["train"], self.tokenizer)
        if self.config.trainer.on_nan is OnNan.skip:
            self.screen.warn(f"{bad.reason} at step {bad.step}, which is skipped; its rows are in {path}.")
        return str(path)

    def _checkpointer(self, state: dict[str, Any], recorder: Recorder) -> Checkpointer:
        trainer = self.config.trainer
        return Checkpointer(
            self.run_directory.checkpoints,
            every=trainer.checkpoint_every,
            keep=trainer.keep_checkpoints,
            monitor=trainer.monitor,
            mode=trainer.mode,
            # Blank metrics are never better.
            patience=None if self.config.data.train_on is TrainOn.all else trainer.patience,
            total_steps=self.total_steps,
            stops=self.data.stops,
            wishes=self._wishes(),
            state=state,
            fit=self.fit.to_plain(),
            seconds=lambda: recorder.seconds,
            command=command_line(),
            on_save_error=trainer.on_save_error,
            tell=self.screen.print,
        )

    def _wishes(self) -> Wishes:
        limit = self.config.trainer.max_time
        deadline = None if limit is None else self.prepared.started + seconds_of(limit, "trainer.max_time")
        return Wishes(self.signals, self.run_directory, deadline)

    def _trainer(self, callbacks: list[Any], first_validates: bool) -> L.Trainer:
        made = lightning_trainer(
            self.config,
            self.device,
            self.precision,
            max_steps=self.total_steps,
            val_check_interval=self.validate_every,
            num_sanity_val_steps=-1 if first_validates else 0,
            logger=self.loggers or False,
            callbacks=[*callbacks, *self.parts.callbacks.values()],
        )
        count_from(made, self.module.step, self.data.steps_per_epoch)
        return made

    # ---------------------------------------------------------------------------------------------------- running

    def _fit(self, trainer: L.Trainer) -> None:
        finished = self.module.step >= self.total_steps or self.checkpointer.stopped_early
        if finished and not self.checkpointer.pending:
            return
        self._guarded(trainer.fit)
        if self.module.step < self.total_steps:
            patience, monitor = self.config.trainer.patience, self.config.trainer.monitor
            by = f"trainer.patience={patience} validations without a better {monitor}"
            by = by if self.checkpointer.stopped_early else "a callback of trainer.callbacks asked for it"
            self.screen.print(f"stopped early after step {self.module.step} of {self.total_steps}: {by}.")

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
            told = "interrupted; the same command goes on from the newest checkpoint."
            raise Interrupted(told, self.signals.received) from error
        except Exception as error:
            if (told_by := failed_callback(error, self.parts.callbacks)) is not None:
                raise told_by from error
            if not is_out_of_memory(error):
                raise
            if self.module.trainer.world_size > 1:  # the other processes cannot follow
                raise ConfigError(
                    f"out of memory in {self.checkpointer.failed_in} ({error}); halve "
                    f"trainer.micro_batch={self.fit.limit}."
                ) from error
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: BaseException) -> OutOfMemory:
        """With what was at most computed at once, so that half of it is less."""
        stage, lengths = self.checkpointer.failed_in, self.splits["train"].lengths
        if stage == "training":
            step = self.data.groups_of_step(self.module.step)
            largest = max((group for share in step for group in share), key=lambda group: int(lengths[group].sum()))
            return OutOfMemory(stage, error, Held(len(largest), int(lengths[largest].sum()), self.fit))
        sizes = [len(group) for split in ("validation", "test") for group in self.data.groups_of(split)]
        generated = len(self.module.generation.samples) if self.module.generation is not None else 0
        return OutOfMemory(stage, error, Held(max(*sizes, generated), 0, self.fit))

    def _finish(self, trainer: L.Trainer, recorder: Recorder) -> float | None:
        config = self.config
        step = self._take_best() if config.trainer.export is Export.best else self.module.step
        if self.main_process:
            self.run_directory.keep_until(self.module.step)
        if self.splits.get("test"):
            self.module.generation = make_generation(config, self.rows, self.parts.metrics, "test")
            self._guarded(trainer.test, verbose=False)
        weights = adapters.whole_state(self.model, trained_only=config.lora.enabled)
        if not self.main_process:
            return None
        run = self.run_directory
        target = run.adapter if config.lora.enabled else run.model
        self.tokenizer.chat_template = self.prompt.config.template
        adapters.save(self.model, self.tokenizer, target, weights)
        write_predictions(self.prepared, self.splits, step)
        before, after = before_and_after(run, step)
        result = {
            "before": before,
            "after": after,
            "step": step,
            "steps": self.module.step,
            "stopped_early": self.checkpointer.stopped_early or self.module.step < self.total_steps,
            "seconds": round(recorder.seconds, 3),
        }
        chance = chance_of(self.prepared, self.module.scoring.metrics if self.module.scoring is not None else {})
        if chance:
            result["chance"] = chance
        if self.module.skipped:
            result["skipped_steps"] = self.module.skipped
        run.finish(result)
        for logger in self.loggers:
            if isinstance(logger, SafeWandbLogger):
                logger.summarise({**{f"best/{k}": v for k, v in after.items()}, "best/step": step})
        self.screen.summary(
            before,
            after,
            {
                "weights": f"{target} (step {step} of {self.total_steps}, {config.trainer.export.value})",
                "time": f"{recorder.seconds:.1f} s in training and validation",
            },
            chance,
            blank=config.data.train_on is TrainOn.all,
        )
        self.exit_code = 0
        return after.get(config.trainer.monitor)

    def _take_best(self) -> int:
        """Puts the best checkpoint's weights back; the last ones stay where that file is damaged."""
        best = self.checkpointer.best_step
        if best is None and self.config.data.train_on is not TrainOn.all:
            self.screen.warn(
                f"no validation had a finite {self.config.trainer.monitor}, so none is the best: the last weights are "
                "handed over."
            )
        if best is None or best == self.module.step:
            return self.module.step
        path = path_of(self.run_directory.checkpoints, best)
        wrong = verify(path)
        if wrong is not None:
            self.screen.warn(f"the best checkpoint (step {best}) is damaged ({wrong}); the last weights are taken.")
            return self.module.step
        adapters.load_trainable_state(self.model, load_checkpoint(path).weights)
        return best

    def close(self) -> None:
        """Ends the loggers and gives the base back as it was."""
        self.signals.release()
        for logger in self.loggers:
            if isinstance(logger, SafeWandbLogger):
                logger.finish(self.exit_code)
            else:
                logger.finalize("success" if self.exit_code == 0 else "failed")
        if self.model is None:
            return
        if self._keeps_base and not is_sharded(self.model):
            adapters.detach(self.model)
        else:
            drop_base()
        self.model = self.base = self.loaded = None

    # ---------------------------------------------------------------------------------------------------- records

    def _targets(self) -> list[str]:
        """The modules that have a LoRA."""
        return sorted(getattr(self.model, "targeted_module_names", []))

    def _ran(self) -> dict[str, Any]:
        """What the model is and does, read from it and not from what was asked for."""
        objective, template = type(self.objective), str(self.prompt.config.template)
        return {
            "quantization": held_as(self.base),
            "weights": weight_counts(self.model),
            "attention": getattr(self.base.config, "_attn_implementation", None),
            "gradient_checkpointing": self.fit.checkpointing.value,
            "objective": f"{objective.__module__}.{objective.__qualname__}",
            "prompt": {
                "name": self.config.prompt.name,
                "of_the_tokenizer": not self.config.prompt.template,
                "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            },
            "lora_modules": {"count": len(self._targets()), "names": last_names(self._targets())},
        }

    def _show_plan(self, resumed_at: int | None) -> None:
        config = self.config
        facts = plan_facts(
            config,
            weight_counts(self.model),
            self.encoder.lengths,
            self.precision,
            self.total_steps,
            self.validate_every,
            held_as(self.base),
            self._targets(),
        )
        facts["at once"] = str(self.fit)
        facts["run"] = str(self.run_directory.directory)
        if resumed_at is not None:
            facts["resumed"] = f"after step {resumed_at}"
        self.screen.plan(facts)
        limits = self.encoder.lengths["train"]
        if limits.rows_cut or limits.rows_dropped:
            by = "".join(f", {count} by {key}" for key, count in limits.dropped_by.items())
            self.screen.warn(
                f"length limits: {limits.rows_cut} training rows were cut in their prompt and {limits.rows_dropped} "
                f"left out{by}, {limits.answer_share_dropped:.1%} of all answer tokens; "
                "`python -m llmft.check` shows more."
            )
        slow = cost(self.objective)
        if slow is not None:
            self.screen.warn(f"task.head=tokens: {slow}.")
        for finding in self.inspection.findings:
            self.screen.warn(f"{finding.key}: {finding.message}.")
        if self.prepared.problems.rejected:
            self.screen.warn(
                f"{len(self.prepared.problems.rejected)} rows left out, see {self.run_directory.rejected_file}."
            )
