"""Pure functions: references and predictions to a number. Each says beside its definition which direction is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Metric = TypeVar("Metric", bound=Callable[..., Any])


def higher_is_better(metric: Metric) -> Metric:
    """Marks a metric of which more is better, by the attribute that the classes of torchmetrics have."""
    metric.higher_is_better = True  # type: ignore[attr-defined]
    return metric


def lower_is_better(metric: Metric) -> Metric:
    """Marks a metric of which less is better."""
    metric.higher_is_better = False  # type: ignore[attr-defined]
    return metric
