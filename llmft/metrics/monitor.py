"""The metrics of a validation, and whether higher or lower is better."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import llmft.metrics
from llmft.config.instantiate import find, metric_functions, reads_text
from llmft.config.sections import TrainConfig
from llmft.config.task import TaskConfig
from llmft.config.trainer import Mode
from llmft.core.errors import ConfigError, did_you_mean
from llmft.metrics.loss import loss_nats, perplexity
from llmft.metrics.rewards import mean_reward


def declared(metric: Any) -> bool | None:
    """Whether a higher `metric` (function, class, instance or partial) is better; None where it is not declared."""
    while isinstance(metric, partial) and "higher_is_better" not in vars(metric):
        metric = metric.func
    direction = getattr(metric, "higher_is_better", None)
    return direction if isinstance(direction, bool) else None


def mode_of(metric: Any, name: str, requested: Mode = Mode.auto, *, key: str | None = "trainer.mode") -> Mode:
    """The direction that `metric` declares, else the requested one.

    Raises ConfigError where they contradict each other, or where there is none. `key` is the request's config key.
    """
    direction = declared(metric)
    if direction is None and requested is Mode.auto:
        raise ConfigError(
            f"{key or 'metric'}: {name} does not declare whether higher or lower is better: put @higher_is_better or "
            "@lower_is_better (of llmft.metrics) above its definition"
            + (f", or set {key}=max or {key}=min." if key else ".")
        )
    mode = requested if direction is None else Mode.max if direction else Mode.min
    if requested not in (Mode.auto, mode):
        better = "higher" if direction else "lower"
        raise ConfigError(f"{key}={requested.value}: {name} declares that {better} is better; set {key}={mode.value}.")
    return mode


def validation_metrics(task: TaskConfig) -> dict[str, Callable[..., float]]:
    """The metrics of a validation by name, such as val/accuracy; without text metrics where nothing is generated."""
    generates = task.generate_rows > 0 and task.auto_class == "causal_lm"
    named = {path.rpartition(".")[2]: path for path in task.metrics}
    metrics: dict[str, Callable[..., float]] = {"loss_nats": loss_nats}
    if not task.predicts:
        metrics["perplexity"] = perplexity
    if task.rollouts and generates:
        metrics["reward"] = mean_reward
    for name, metric in metric_functions(task.metrics, task.metric_options).items():
        if generates or (task.predicts and not reads_text(named[name])):
            metrics[name] = metric
    return {f"val/{name}": metric for name, metric in metrics.items()}


def with_mode(config: TrainConfig) -> TrainConfig:
    """`config` with trainer.mode=auto replaced by the direction of trainer.monitor.

    Raises ConfigError for a metric that the validation does not have, or whose direction is unknown or contradicted.
    """
    monitor, metrics = config.trainer.monitor, validation_metrics(config.task)
    if monitor not in metrics:
        if monitor.removeprefix("val/") in {path.rpartition(".")[2] for path in config.task.metrics}:
            raise ConfigError(
                f"trainer.monitor={monitor}: it scores generations, and there are none "
                f"(task.generate_rows={config.task.generate_rows}, task.auto_class={config.task.auto_class})."
            )
        raise ConfigError(f"trainer.monitor={monitor}: no such metric{did_you_mean(monitor, metrics)}")
    mode = mode_of(metrics[monitor], monitor, config.trainer.mode)
    return replace(config, trainer=replace(config.trainer, mode=mode))


def named_metric(name: str, paths: Sequence[str] = ()) -> Any:
    """The metric called val/accuracy, say: from `paths`, a dotted path, or llmft.metrics; None if unknown."""
    last = name.rpartition("/")[2]
    dotted = last if "." in last else next((path for path in paths if path.rpartition(".")[2] == last), None)
    if dotted is not None:
        with contextlib.suppress(ConfigError):
            return find(dotted, "metric" if dotted == last else "task.metrics", "metric")
    names = [f"llmft.metrics.{info.name}" for info in pkgutil.iter_modules(llmft.metrics.__path__)]
    candidates = [metric for module in names if (metric := getattr(importlib.import_module(module), last, None))]
    return candidates[0] if len({declared(metric) for metric in candidates}) == 1 else None
