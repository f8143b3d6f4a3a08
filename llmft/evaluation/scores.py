"""Predictions with known targets to numbers: metrics, bootstrap intervals, per class and per slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmft.config.instantiate import metric_functions
from llmft.config.sections import TaskType
from llmft.core.errors import ConfigError, DataError
from llmft.runs.predictions import TEXT, Predictions

Metric = Callable[[Any, Any], float]
_CLASSES = "llmft.metrics.classification."
DEFAULTS = {
    TaskType.single_label.value: [
        f"{_CLASSES}{name}" for name in ("logloss", "accuracy", "macro_f1", "auc", "calibration_error")
    ],
    TaskType.multi_label.value: [f"llmft.metrics.multilabel.{n}" for n in ("logloss", "accuracy", "macro_f1", "auc")],
    TaskType.regression.value: [f"llmft.metrics.regression.{n}" for n in ("rmse", "mae", "pearson", "spearman")],
    TEXT: [f"llmft.metrics.text.{name}" for name in ("exact_match", "token_f1", "bleu", "rouge_l")],
}
MOST_SLICES = 100


def metrics_for(
    predictions: Predictions, paths: Sequence[str], options: dict[str, Any] | None = None
) -> dict[str, Metric]:
    """The metrics named, or those that fit the predictions."""
    return metric_functions(list(paths) or DEFAULTS[predictions.problem], options)


def pair(predictions: Predictions) -> tuple[Any, Any]:
    """References and predictions as metrics take them. Raises DataError where targets are not known."""
    if not predictions.known:
        raise DataError("the true targets of some rows are not known: nothing can be scored.")
    if predictions.problem == TEXT:
        return [str(target) for target in predictions.targets], predictions.predicted
    return predictions.references(), predictions.values


def score(predictions: Predictions, metrics: dict[str, Metric]) -> dict[str, float]:
    """Every metric's value."""
    references, values = pair(predictions)
    return {name: metric(references, values) for name, metric in metrics.items()}


def bootstrap(
    predictions: Predictions, metrics: dict[str, Metric], resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile intervals (Efron 1979) over `resamples` draws of the rows with replacement.

    Where rows have groups, whole groups are drawn: the answers to one question are not independent.
    """
    references, values = pair(predictions)
    text = predictions.problem == TEXT
    units = _units(predictions)
    generator = np.random.Generator(np.random.PCG64([seed]))
    found: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(resamples):
        drawn = np.concatenate([units[unit] for unit in generator.integers(len(units), size=len(units))])
        own = [references[row] for row in drawn] if text else references[drawn]
        theirs = [values[row] for row in drawn] if text else values[drawn]
        for name, metric in metrics.items():
            found[name].append(metric(own, theirs))
    tail = 100 * (1 - confidence) / 2
    return {
        name: (float(np.nanpercentile(all_values, tail)), float(np.nanpercentile(all_values, 100 - tail)))
        for name, all_values in found.items()
        if np.isfinite(all_values).any()
    }


def _units(predictions: Predictions) -> list[np.ndarray]:
    groups = predictions.columns.get("group")
    if groups is None:
        return [np.asarray([row]) for row in range(len(predictions.ids))]
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(str(group), []).append(row)
    return [np.asarray(rows) for rows in members.values()]


def per_class(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Rows, precision, recall and F1 of each class; empty where there are none."""
    if predictions.problem not in (TaskType.single_label.value, TaskType.multi_label.value):
        return {}
    from sklearn.metrics import precision_recall_fscore_support

    references, values = pair(predictions)
    single = predictions.problem == TaskType.single_label.value
    guesses = values.argmax(axis=1) if single else (values >= 0.5).astype(int)
    labels = np.arange(len(predictions.labels))
    numbers = precision_recall_fscore_support(references, guesses, labels=labels, zero_division=0.0)
    return {
        label: {"rows": int(rows), "precision": float(p), "recall": float(r), "f1": float(f)}
        for label, p, r, f, rows in zip(predictions.labels, *numbers, strict=True)
    }


def per_slice(
    predictions: Predictions, columns: dict[str, list[Any]], metrics: dict[str, Metric]
) -> dict[str, dict[str, dict[str, float]]]:
    """Rows and metrics for each value of each column. Raises ConfigError for a column of too many values."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, values in columns.items():
        texts = [str(value) for value in values]
        different = sorted(set(texts))
        if len(different) > MOST_SLICES:
            raise ConfigError(f"slice={name}: {len(different):,} different values; a column of kinds was expected.")
        found[name] = {}
        for value in different:
            rows = [row for row, own in enumerate(texts) if own == value]
            found[name][value] = {"rows": len(rows), **score(predictions.at(rows), metrics)}
    return found


def confusion(predictions: Predictions) -> list[list[int]]:
    """Rows by true class and likeliest class; empty for other problems."""
    if predictions.problem != TaskType.single_label.value:
        return []
    from llmft.metrics.classification import confusion as matrix

    return matrix(*pair(predictions))
