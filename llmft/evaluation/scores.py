"""Scores of predictions with known targets: metrics, bootstrap intervals, per class and per slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmft.config.instantiate import metric_functions
from llmft.config.task import TaskType
from llmft.core.errors import ConfigError, DataError
from llmft.runs.predictions import TEXT, Predictions

Metric = Callable[[Any, Any], float]
_NAMES = {
    TaskType.single_label: ("classification", "logloss accuracy macro_f1 auc calibration_error"),
    TaskType.multi_label: ("multilabel", "logloss accuracy macro_f1 auc"),
    TaskType.regression: ("regression", "rmse mae pearson spearman"),
    TEXT: ("text", "exact_match token_f1 bleu rouge_l"),
}
DEFAULTS = {kind: [f"llmft.metrics.{file}.{name}" for name in names.split()] for kind, (file, names) in _NAMES.items()}
"""The metrics of each kind of prediction."""
MAX_SLICES = 100


def metrics_for(
    predictions: Predictions, paths: Sequence[str], options: dict[str, Any] | None = None
) -> dict[str, Metric]:
    """The named metrics, or the defaults for these predictions."""
    return metric_functions(list(paths) or DEFAULTS[predictions.problem], options)


def references_and_predictions(predictions: Predictions) -> tuple[Any, Any]:
    """The arguments of a metric. Raises DataError where targets are unknown."""
    if not predictions.known:
        raise DataError("the true targets of some rows are unknown, so nothing can be scored.")
    if predictions.problem == TEXT:
        return [str(target) for target in predictions.targets], predictions.predicted
    return predictions.references(), predictions.values


def score(predictions: Predictions, metrics: dict[str, Metric]) -> dict[str, float]:
    references, values = references_and_predictions(predictions)
    return {name: metric(references, values) for name, metric in metrics.items()}


def bootstrap(
    predictions: Predictions, metrics: dict[str, Metric], resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile intervals (Efron 1979) from `resamples` draws of the rows with replacement.

    Rows with groups are drawn by group, since the answers to one question are not independent.
    """
    references, values = references_and_predictions(predictions)
    text = predictions.problem == TEXT
    rows = range(len(predictions.ids))
    groups: dict[str, list[int]] = {}
    for row, group in zip(rows, predictions.columns.get("group", rows), strict=True):
        groups.setdefault(str(group), []).append(row)
    units = [np.asarray(rows_of_group) for rows_of_group in groups.values()]
    generator = np.random.Generator(np.random.PCG64([seed]))
    samples: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(resamples):
        chosen = np.concatenate([units[unit] for unit in generator.integers(len(units), size=len(units))])
        chosen_references = [references[row] for row in chosen] if text else references[chosen]
        chosen_values = [values[row] for row in chosen] if text else values[chosen]
        for name, metric in metrics.items():
            samples[name].append(metric(chosen_references, chosen_values))
    percentile = 100 * (1 - confidence) / 2
    intervals = {}
    for name, values_of_metric in samples.items():
        if np.isfinite(values_of_metric).any():
            low, high = np.nanpercentile(values_of_metric, [percentile, 100 - percentile])
            intervals[name] = (float(low), float(high))
    return intervals


def per_class(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Rows, precision, recall and F1 of each class; empty for a task without classes."""
    if predictions.problem not in (TaskType.single_label, TaskType.multi_label):
        return {}
    from sklearn.metrics import precision_recall_fscore_support

    references, values = references_and_predictions(predictions)
    single = predictions.problem == TaskType.single_label
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
    """Rows and metrics for each value of each column. Raises ConfigError for a column with too many values."""
    slices: dict[str, dict[str, dict[str, float]]] = {}
    for name, values in columns.items():
        texts = [str(value) for value in values]
        kinds = sorted(set(texts))
        if len(kinds) > MAX_SLICES:
            raise ConfigError(f"slice={name}: {len(kinds):,} different values; at most {MAX_SLICES} were expected.")
        slices[name] = {}
        for kind in kinds:
            rows = [row for row, text in enumerate(texts) if text == kind]
            slices[name][kind] = {"rows": len(rows), **score(predictions.at(rows), metrics)}
    return slices


def confusion(predictions: Predictions) -> list[list[int]]:
    """Rows by true class and likeliest class; empty for other tasks."""
    if predictions.problem != TaskType.single_label:
        return []
    from llmft.metrics.classification import confusion as matrix

    return matrix(*references_and_predictions(predictions))
