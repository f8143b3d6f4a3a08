"""Metrics for regressions, of (targets, predictions)."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmft.metrics import higher_is_better, lower_is_better, mean_over_rows


def _as_vectors(targets: Any, predictions: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(targets, dtype=np.float64).reshape(-1), np.asarray(predictions, dtype=np.float64).reshape(-1)


@lower_is_better
def rmse(targets: Any, predictions: Any) -> float:
    """Root of the mean squared error, in the targets' unit."""
    truth, predicted = _as_vectors(targets, predictions)
    return float(np.sqrt(np.mean((truth - predicted) ** 2)))


@lower_is_better
@mean_over_rows
def mae(targets: Any, predictions: Any) -> Any:
    """Mean absolute error, in the targets' unit."""
    truth, predicted = _as_vectors(targets, predictions)
    return np.abs(truth - predicted)


@higher_is_better
def pearson(targets: Any, predictions: Any) -> float:
    """Pearson's correlation; NaN where either side is constant."""
    truth, predicted = _as_vectors(targets, predictions)
    if truth.std() == 0 or predicted.std() == 0:
        return float("nan")
    return float(np.corrcoef(truth, predicted)[0, 1])


@higher_is_better
def spearman(targets: Any, predictions: Any) -> float:
    """Correlation of the ranks; NaN where either side is constant."""
    from scipy.stats import rankdata

    truth, predicted = _as_vectors(targets, predictions)
    return pearson(rankdata(truth), rankdata(predicted))
