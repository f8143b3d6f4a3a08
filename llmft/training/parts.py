"""Builds what a config names by dotted paths, before rows are tokenised or weights loaded."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import callbacks as lightning

from llmft.config.instantiate import build, check_target, find, metric_functions, optimizer_factory
from llmft.config.sections import TrainConfig
from llmft.config.trainer import Mode
from llmft.core.errors import ConfigError, did_you_mean
from llmft.metrics.monitor import mode_of, validation_metrics, with_mode
from llmft.training.scoring import check_objective

if TYPE_CHECKING:
    import torch


REFUSED: tuple[tuple[tuple[type, ...], str], ...] = (
    (
        (lightning.Checkpoint,),
        "llmft writes checkpoints itself; trainer.checkpoint_every and trainer.keep_checkpoints set when and how many",
    ),
    ((lightning.ProgressBar, lightning.ModelSummary), "llmft shows plan and progress; progress=false shows none"),
    (
        (lightning.GradientAccumulationScheduler, lightning.BatchSizeFinder),
        "llmft splits steps itself; trainer.batch_size sets a step's rows, trainer.micro_batch those computed at once",
    ),
    ((lightning.LearningRateFinder,), "llmft sets the rate itself; learning_rate.peak may be varied in a sweep"),
    (
        (
            *(lightning.BaseFinetuning, lightning.ModelPruning, lightning.StochasticWeightAveraging),
            *(lightning.WeightAveraging, lightning.BasePredictionWriter),
        ),
        "it changes or reads a loop of Lightning's that llmft does not use, so it would do nothing or harm",
    ),
)
NEED_LOGGER = (lightning.LearningRateMonitor, lightning.DeviceStatsMonitor, lightning.ThroughputMonitor)


@dataclass
class Parts:
    """The optimizer, metrics and callbacks that config and task name."""

    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    metrics: dict[str, Callable[..., float]]
    callbacks: dict[str, Any]


def check_parts(config: TrainConfig) -> Parts:
    """Builds the parts that need neither rows nor weights; raises ConfigError naming the key of an invalid one."""
    with_mode(config)
    for name, node in config.logger.loggers.items():
        check_target(node, f"logger.loggers.{name}", "logger")
    metrics = metric_functions(config.task.metrics, config.task.metric_options)
    for metric in metrics.values() if config.task.generate_rows else ():
        # Raises for a missing sentence encoder before the weights load.
        ready = getattr(getattr(metric, "func", metric), "ready", None)
        if ready is not None:
            ready(**getattr(metric, "keywords", {}))
    check_objective(config.task)
    if config.task.rollouts:
        from llmft.training.rollouts import check_rollouts

        check_rollouts(config)
    if isinstance(config.trainer.strategy, dict):
        check_target(config.trainer.strategy, "trainer.strategy", "strategy")
    make_optimizer = optimizer_factory(config.optimizer, config.learning_rate.peak)
    nodes = config.trainer.callbacks.items()
    callbacks = {name: _callback(node, f"trainer.callbacks.{name}", config) for name, node in nodes}
    return Parts(make_optimizer, metrics, callbacks)


def _callback(node: dict[str, Any], key: str, config: TrainConfig) -> Any:
    """Builds a Lightning callback; one that monitors a metric gets that metric's direction, or is refused."""
    check_target(node, key, "callback")
    monitor, metrics = node.get("monitor"), validation_metrics(config.task)
    if isinstance(monitor, str) and monitor.startswith("val/"):
        if monitor not in metrics:
            raise ConfigError(f"{key}.monitor={monitor}: no such metric{did_you_mean(monitor, metrics)}")
        takes = inspect.signature(find(str(node.get("_target_")), f"{key}._target_", "callback")).parameters
        if "mode" in takes and node.get("mode", "auto") in ("auto", "min", "max"):
            mode = mode_of(metrics[monitor], monitor, Mode(node.get("mode", "auto")), key=f"{key}.mode")
            node = {**node, "mode": mode.value}
    callback = build(node, key, "callback")
    kind = type(callback).__name__
    for kinds, reason in REFUSED:
        if isinstance(callback, kinds):
            raise ConfigError(f"{key}: {kind} cannot be used: {reason}.")
    if isinstance(callback, NEED_LOGGER) and not (config.logger.wandb.enabled or config.logger.loggers):
        raise ConfigError(f"{key}: {kind} needs a logger; set logger=csv, tensorboard or wandb, or leave it out.")
    return callback


def failed_callback(error: BaseException, callbacks: dict[str, Any]) -> ConfigError | None:
    """The ConfigError for an error raised by one of `callbacks`; None for any other."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name, callback in callbacks.items():
            if frame.f_locals.get("self") is callback:
                reason = " ".join(str(error).split()) or type(error).__name__
                return ConfigError(f"trainer.callbacks.{name}: {type(callback).__name__} failed: {reason.rstrip('.')}.")
    return None
