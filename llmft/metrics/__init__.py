"""Metrics: pure functions of references and predictions, each declared as higher or lower is better."""

from __future__ import annotations

from collections.abc import Callable
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
