"""Metrics of numbers: (targets, predictions) to a number."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmft.metrics import higher_is_better, lower_is_better


def _two(targets: Any, predictions: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(targets, dtype=np.float64).reshape(-1), np.asarray(predictions, dtype=np.float64).reshape(-1)


@lower_is_better
def rmse(targets: Any, predictions: Any) -> float:
    """Root of the mean squared error, in the targets' unit."""
    own, found = _two(targets, predictions)
    return float(np.sqrt(np.mean((own - found) ** 2)))


@lower_is_better
def mae(targets: Any, predictions: Any) -> float:
    """Mean absolute error, in the targets' unit."""
    own, found = _two(targets, predictions)
    return float(np.mean(np.abs(own - found)))


@higher_is_better
def pearson(targets: Any, predictions: Any) -> float:
    """Correlation; not a number where either side is constant."""
    own, found = _two(targets, predictions)
    if own.std() == 0 or found.std() == 0:
        return float("nan")
    return float(np.corrcoef(own, found)[0, 1])


@higher_is_better
def spearman(targets: Any, predictions: Any) -> float:
    """Correlation of the ranks; not a number where either side is constant."""
    from scipy.stats import rankdata

    own, found = _two(targets, predictions)
    return pearson(rankdata(own), rankdata(found))
