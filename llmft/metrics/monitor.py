"""Which metrics a validation has, and which direction of each is better: declared beside the metric, read here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import llmft.metrics
from llmft.config.instantiate import find, metric_functions, reads_text
from llmft.config.sections import Mode, TaskConfig, TrainConfig
from llmft.core.errors import ConfigError, did_you_mean
from llmft.metrics.loss import loss_nats, perplexity


def declared(metric: Any) -> bool | None:
    """Whether more of `metric` (a function, class, instance, or a partial of one) is better; None where it says not."""
    while isinstance(metric, partial) and "higher_is_better" not in vars(metric):
        metric = metric.func
    said = getattr(metric, "higher_is_better", None)
    return said if isinstance(said, bool) else None


def mode_of(metric: Any, name: str, asked: Mode = Mode.auto, *, key: str | None = "trainer.mode") -> Mode:
    """min or max: the direction that `metric` declares, or the one that is asked for where it declares none.

    Raises ConfigError where the two contradict each other, or nobody says. `key` is where one may ask, if anywhere.
    """
    said = declared(metric)
    if said is None and asked is Mode.auto:
        raise ConfigError(
            f"{key or 'metric'}: nothing says whether more or less of {name} is better: put @higher_is_better or "
            "@lower_is_better (of llmft.metrics) above the metric's definition"
            + (f", or set {key}=max or {key}=min." if key else ".")
        )
    mode = asked if said is None else Mode.max if said else Mode.min
    if asked not in (Mode.auto, mode):
        raise ConfigError(
            f"{key}={asked.value}: {'more' if said else 'less'} of {name} is better, as that metric declares; leave "
            f"{key} out, or set it to {mode.value}."
        )
    return mode


def validation_metrics(task: TaskConfig) -> dict[str, Callable[..., float]]:
    """Every metric of a validation by its name, such as val/accuracy; without those that read what is not generated."""
    generates = task.generate_rows > 0 and task.auto_class == "causal_lm"
    named = {path.rpartition(".")[2]: path for path in task.metrics}
    metrics: dict[str, Callable[..., float]] = {"loss_nats": loss_nats}
    if task.head is None:
        metrics["perplexity"] = perplexity
    for name, metric in metric_functions(task.metrics, task.metric_options).items():
        if generates or (task.head is not None and not reads_text(named[name])):
            metrics[name] = metric
    return {f"val/{name}": metric for name, metric in metrics.items()}


def with_mode(config: TrainConfig) -> TrainConfig:
    """`config` with the direction of its monitored metric in place of trainer.mode=auto.

    Raises ConfigError for a metric that no validation has, or whose direction is contradicted or not said.
    """
    monitor, metrics = config.trainer.monitor, validation_metrics(config.task)
    if monitor not in metrics:
        if monitor.removeprefix("val/") in {path.rpartition(".")[2] for path in config.task.metrics}:
            raise ConfigError(
                f"trainer.monitor={monitor}: it is scored on generations, and there are none "
                f"(task.generate_rows={config.task.generate_rows}, task.auto_class={config.task.auto_class})."
            )
        raise ConfigError(f"trainer.monitor={monitor}: no such metric{did_you_mean(monitor, metrics)}")
    mode = mode_of(metrics[monitor], monitor, config.trainer.mode)
    return replace(config, trainer=replace(config.trainer, mode=mode))


def named_metric(name: str, paths: Sequence[str] = ()) -> Any:
    """The metric of a name such as val/accuracy: one of `paths`, a dotted path, or llmft's own; None for another."""
    last = name.rpartition("/")[2]
    try:
        if "." in last:
            return find(last, "metric", "metric")
        return find(next(path for path in paths if path.rpartition(".")[2] == last), "task.metrics", "metric")
    except (StopIteration, ConfigError):
        pass
    modules = [importlib.import_module(f"llmft.metrics.{m.name}") for m in pkgutil.iter_modules(llmft.metrics.__path__)]
    same = [metric for module in modules if (metric := getattr(module, last, None)) is not None]
    return same[0] if len({declared(metric) for metric in same}) == 1 else None
