"""Builds the task's objective, and the metrics of its predictions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llmft.config.instantiate import check_arguments, find, reads_text
from llmft.config.task import Advantage, Head, KlWhere, Reference, TaskConfig
from llmft.core.errors import ConfigError
from llmft.data.encode import Encoder
from llmft.data.examples import Examples
from llmft.data.targets import Targets
from llmft.metrics.preference import accuracy, degree_names
from llmft.training.objectives.base import Objective


def check_objective(task: TaskConfig) -> None:
    """Raises ConfigError for an objective, or one of its arguments, that does not fit the task; needs no rows."""
    objective, path = find(str(task.objective), "task.objective", "objective"), str(task.objective)
    check_arguments(objective, path, task.objective_options, "task.objective_options")
    takes = inspect.signature(objective).parameters
    if not task.predicts:
        if "targets" in takes:
            raise ConfigError(
                f"task.objective={path} learns targets, which needs task.head=linear or task.head=tokens."
            )
        for metric in task.metrics:
            if metric.startswith("llmft.metrics.") and not reads_text(metric):
                raise ConfigError(f"task.metrics={metric} reads predictions, which need a task.head.")
    elif task.head is not None and "targets" not in takes:
        raise ConfigError(
            f"task.objective={path} takes no targets, which task.head={task.head.value} learns: leave it out, or "
            "set task.head=null."
        )
    settings = {"targets": None, "scores": None, **_of_head(task)} if task.head is not None else _of_feedback(task)
    for name in task.objective_options.keys() & settings.keys():
        raise ConfigError(f"task.objective_options.{name}: the task sets it; leave it out.")
    for name in sorted(settings.keys() - takes.keys()):
        if settings[name] or (name == "scores" and task.head is Head.tokens):
            raise ConfigError(f"task.objective={path} takes no {name}, which this task passes.")
    _check_loss(task, takes)
    try:
        inspect.signature(objective).bind(**{n: v for n, v in settings.items() if n in takes}, **task.objective_options)
    except TypeError as error:
        raise ConfigError(f"task.objective={path}: {error} (task.objective_options).") from None


def _of_head(task: TaskConfig) -> dict[str, Any]:
    """The task's settings for an objective of targets."""
    return {"label_smoothing": task.label_smoothing, "text_loss": task.text_loss}


def _of_feedback(task: TaskConfig) -> dict[str, Any]:
    """The task's settings, other than defaults, for an objective of feedback."""
    keys = ("loss", "loss_options", "beta", "sft_weight", "centre", "label_smoothing")
    defaults = TaskConfig(name="", objective="")
    return {key: getattr(task, key) for key in keys if getattr(task, key) != getattr(defaults, key)}


def _check_loss(task: TaskConfig, takes: Mapping[str, Any]) -> None:
    """Raises ConfigError for a loss that does not exist, and for settings that it would not use."""
    if task.feedback is None:
        for key, used in (("margin", task.margin != "none"), ("reference", task.reference is not Reference.none)):
            if used:
                raise ConfigError(f"task.{key}: task={task.name} compares no answers; leave it out.")
        return
    if "loss" not in takes or task.loss is None:
        return
    from llmft.training.objectives.preference import find_loss

    loss = find_loss(task.loss, task.loss_options)
    arguments = inspect.signature(loss).parameters
    for key, used in (("margin", task.margin != "none"), ("label_smoothing", task.label_smoothing > 0)):
        if used and key not in arguments:
            raise ConfigError(f"task.{key}: task.loss={task.loss} takes none; leave it out, or choose another loss.")


def make_objective(
    task: TaskConfig, targets: Targets | None, encoder: Encoder, splits: Mapping[str, Examples]
) -> Objective:
    """The task's objective. Raises ConfigError for class words whose tokens do not differ."""
    objective = find(str(task.objective), "task.objective", "objective")
    options = dict(task.objective_options) | (_of_feedback(task) if task.feedback is not None else {})
    if task.rollouts:
        options |= {
            "aggregate": task.aggregate.value,
            "clip": (task.clip[0], task.clip[1]),
            "ratio": task.ratio.value,
            "kl": task.kl.beta if task.kl.where is KlWhere.loss else 0.0,
            "estimator": task.kl.estimator.value,
            "value_weight": task.value_weight if task.advantage is Advantage.gae else 0.0,
            "temperature": task.temperature,
        }
    if task.head is not None:
        takes = inspect.signature(objective).parameters
        options |= {name: value for name, value in _of_head(task).items() if name in takes}
        options["targets"] = targets
    if task.head is Head.tokens:
        from llmft.training.objectives.verbalizer import make_scores

        assert targets is not None
        options["scores"] = make_scores(encoder, targets.words, dict(splits))
    try:
        return objective(**options)
    except Exception as error:
        raise ConfigError(f"task.objective={task.objective}: cannot be built ({error}).") from None


@dataclass
class Scoring:
    """The metrics of an objective's predictions, and their references.

    Attributes:
        metrics: functions (references, predictions) -> float.
        references: the targets of a split's rows, by the split's name in metrics (val, test).
    """

    metrics: dict[str, Callable[[Any, Any], float]]
    references: dict[str, np.ndarray]


def make_scoring(
    task: TaskConfig,
    metrics: Mapping[str, Callable[..., float]],
    splits: Mapping[str, Examples],
    degrees: Sequence[str],
) -> Scoring | None:
    """How validation scores predictions; None where there are only losses and texts.

    Each of the `degrees` of compared answers gets an accuracy, where every split has it.
    """
    if task.feedback is None and task.head is None:
        return None
    names = [path.rpartition(".")[2] for path in task.metrics if not reads_text(path)]
    scored = {name: metrics[name] for name in names}
    held_out = (("validation", "val"), ("test", "test"))
    rows = {name: [row.conversation for row in splits[split]] for split, name in held_out if split in splits}
    if task.feedback is None:
        return Scoring(scored, {name: np.asarray([row.target for row in part]) for name, part in rows.items()})
    compared = {name: [row.comparison for row in part] for name, part in rows.items()}
    references = {
        name: np.asarray([-1 if pair is None or pair.degree is None else pair.degree for pair in part])
        for name, part in compared.items()
    }
    for degree, name in enumerate(degree_names(degrees)):
        if all((values == degree).any() for values in references.values()):
            scored[name] = partial(_accuracy_at, degree)
    return Scoring(scored, references)


def _accuracy_at(degree: int, references: np.ndarray, outputs: np.ndarray) -> float:
    return accuracy(references, outputs[references == degree])
