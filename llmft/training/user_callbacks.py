"""Callbacks that a config names: which of them fit beside llmft's own loop, and what is said where one fails."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import callbacks as lightning

from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError

REFUSED: tuple[tuple[tuple[type, ...], str], ...] = (
    (
        (lightning.Checkpoint,),
        "llmft writes checkpoints itself; trainer.checkpoint_every and trainer.keep_checkpoints say when and how many",
    ),
    (
        (lightning.ProgressBar, lightning.ModelSummary),
        "llmft shows plan and progress; progress=false shows none",
    ),
    (
        (lightning.GradientAccumulationScheduler, lightning.BatchSizeFinder),
        "llmft cuts steps itself; trainer.batch_size says how many rows, trainer.micro_batch how many at once",
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


def check_callbacks(config: TrainConfig, callbacks: dict[str, Any]) -> dict[str, Any]:
    """The `callbacks` of trainer.callbacks; raises ConfigError for one that does not fit a run of `config`."""
    for name, callback in callbacks.items():
        key, kind = f"trainer.callbacks.{name}", type(callback).__name__
        for kinds, reason in REFUSED:
            if isinstance(callback, kinds):
                raise ConfigError(f"{key}: {kind} has no place here: {reason}.")
        if isinstance(callback, NEED_LOGGER) and not (config.logger.wandb.enabled or config.logger.loggers):
            raise ConfigError(f"{key}: {kind} needs a logger; set logger=csv, tensorboard or wandb, or leave it out.")
    return callbacks


def failed_callback(error: BaseException, callbacks: dict[str, Any]) -> ConfigError | None:
    """What is told of an error that came out of one of `callbacks`; None for any other."""
    trace = error.__traceback__
    while trace is not None:
        inside = trace.tb_frame.f_locals.get("self")
        for name, callback in callbacks.items():
            if inside is callback:
                told = " ".join(str(error).split()) or type(error).__name__
                return ConfigError(f"trainer.callbacks.{name}: {type(callback).__name__} failed: {told.rstrip('.')}.")
        trace = trace.tb_next
    return None
