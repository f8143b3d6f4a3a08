"""Metrics of several classes per row: ((rows, classes) of 0 and 1, (rows, classes) probabilities) to a number."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmft.metrics import higher_is_better, lower_is_better
from llmft.metrics.classification import area_under_roc


@lower_is_better
def logloss(targets: Any, probabilities: Any) -> float:
    """Mean over rows and classes of the binary negative log-likelihood in nats, clipped to [1e-15, 1 - 1e-15]."""
    own = np.asarray(targets, dtype=np.float64)
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-15, 1 - 1e-15)
    return float(-(own * np.log(clipped) + (1 - own) * np.log1p(-clipped)).mean())


@higher_is_better
def accuracy(targets: Any, probabilities: Any) -> float:
    """Share of rows in which every class is right at a threshold of one half."""
    return float(((np.asarray(probabilities) >= 0.5) == (np.asarray(targets) == 1)).all(axis=1).mean())


@higher_is_better
def macro_f1(targets: Any, probabilities: Any) -> float:
    """Mean of the classes' F1 at a threshold of one half; 0 for a class that is neither true nor predicted."""
    from sklearn.metrics import f1_score

    predicted = (np.asarray(probabilities) >= 0.5).astype(int)
    return float(f1_score(np.asarray(targets), predicted, average="macro", zero_division=0.0))


@higher_is_better
def auc(targets: Any, probabilities: Any) -> float:
    """Area under the ROC curve, mean over the classes that some rows have and some have not; else not a number."""
    own, probabilities = np.asarray(targets) == 1, np.asarray(probabilities)
    areas = [area_under_roc(own[:, place], probabilities[:, place]) for place in range(own.shape[1])]
    found = [area for area in areas if area is not None]
    return float(np.mean(found)) if found else float("nan")
