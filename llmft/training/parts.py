"""What a config names by dotted paths, built before rows are tokenised or weights loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmft.config.instantiate import build, check_target, find, metric_functions, optimizer_factory
from llmft.config.sections import Mode, TaskConfig, TrainConfig
from llmft.core.errors import ConfigError, did_you_mean
from llmft.metrics.monitor import mode_of, validation_metrics, with_mode
from llmft.training.scoring import check_objective
from llmft.training.tracking import check_loggers
from llmft.training.user_callbacks import check_callbacks

if TYPE_CHECKING:
    import torch


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
    if config.task.rollouts:
        from llmft.training.rollouts import check_rollouts

        check_rollouts(config)
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
