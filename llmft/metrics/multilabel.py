"""Metrics for several classes per row, of ((rows, classes) of 0 and 1, (rows, classes) probabilities)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmft.metrics import higher_is_better, lower_is_better, mean_over_rows
from llmft.metrics.classification import areas_under_roc


@lower_is_better
def logloss(targets: Any, probabilities: Any) -> float:
    """Mean binary negative log-likelihood over rows and classes in nats, clipped to [1e-15, 1 - 1e-15]."""
    truth = np.asarray(targets, dtype=np.float64)
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-15, 1 - 1e-15)
    return float(-(truth * np.log(clipped) + (1 - truth) * np.log1p(-clipped)).mean())


@higher_is_better
@mean_over_rows
def accuracy(targets: Any, probabilities: Any) -> Any:
    """Share of rows in which every class is right, at a threshold of 0.5."""
    return ((np.asarray(probabilities) >= 0.5) == (np.asarray(targets) == 1)).all(axis=1).astype(float)


@higher_is_better
def macro_f1(targets: Any, probabilities: Any) -> float:
    """Mean F1 of the classes at a threshold of 0.5; 0 for a class that is neither true nor predicted."""
    from sklearn.metrics import f1_score

    predicted = (np.asarray(probabilities) >= 0.5).astype(int)
    return float(f1_score(np.asarray(targets), predicted, average="macro", zero_division=0.0))


@higher_is_better
def auc(targets: Any, probabilities: Any) -> float:
    """Area under the ROC curve, mean over the classes that some but not all rows have; NaN without any."""
    areas = areas_under_roc(np.asarray(targets) == 1, np.asarray(probabilities))
    return float(np.mean(areas)) if areas else math.nan
