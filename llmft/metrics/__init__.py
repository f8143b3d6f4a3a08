"""Metrics: pure functions of references and predictions, each declared as higher or lower is better."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Metric = TypeVar("Metric", bound=Callable[..., Any])


def higher_is_better(metric: Metric) -> Metric:
    """Declares that a higher value is better, with the attribute that torchmetrics uses."""
    metric.higher_is_better = True  # type: ignore[attr-defined]
    return metric


def lower_is_better(metric: Metric) -> Metric:
    """Declares that a lower value is better."""
    metric.higher_is_better = False  # type: ignore[attr-defined]
    return metric


def mean_over_rows(rows: Callable[..., Any]) -> Callable[..., float]:
    """Makes a metric from a function that gives each row's score: their mean, without rows that have none (NaN).

    Validations store the scores, so that verdicts know the metric's noise over rows.
    """

    @functools.wraps(rows)
    def metric(references: Any, predictions: Any, **options: Any) -> float:
        return _mean(rows(references, predictions, **options))

    metric.__annotations__ = {**rows.__annotations__, "return": "float"}
    metric.row_scores = rows  # type: ignore[attr-defined]
    return metric


def score(metric: Callable[..., float], references: Any, predictions: Any) -> tuple[float, list[float] | None]:
    """(value, each row's score) of a metric; None for the scores of one that is no mean over rows, such as an AUC."""
    options: dict[str, Any] = {}
    original = metric
    while isinstance(metric, functools.partial):
        options, metric = {**metric.keywords, **options}, metric.func
    rows = getattr(metric, "row_scores", None)
    if rows is None:
        return original(references, predictions), None
    scores = [float(value) for value in rows(references, predictions, **options)]
    return _mean(scores), scores


def _mean(scores: Sequence[float]) -> float:
    known = [float(value) for value in scores if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
