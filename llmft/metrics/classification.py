"""Metrics of one class per row: (class indices, (rows, classes) probabilities) to a number; by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmft.metrics import higher_is_better, lower_is_better


@lower_is_better
def logloss(targets: Any, probabilities: Any) -> float:
    """Mean negative log-likelihood in nats, clipped as Kaggle does: to [1e-15, 1 - 1e-15], rows then sum to one."""
    # scikit-learn's own checks take fifty times as long, which hill climbing and a bootstrap feel.
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-15, 1 - 1e-15)
    clipped /= clipped.sum(axis=1, keepdims=True)
    return float(-np.log(clipped[np.arange(len(clipped)), np.asarray(targets)]).mean())


@higher_is_better
def accuracy(targets: Any, probabilities: Any) -> float:
    """Share of rows whose likeliest class is the true one; 0 to 1."""
    return float((np.argmax(probabilities, axis=1) == np.asarray(targets)).mean())


@higher_is_better
def macro_f1(targets: Any, probabilities: Any) -> float:
    """Mean of the classes' F1, over the classes that are true or predicted in some row; 0 to 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(targets, np.argmax(probabilities, axis=1), average="macro", zero_division=0.0))


@higher_is_better
def auc(targets: Any, probabilities: Any) -> float:
    """Area under the ROC curve of each class against the rest, mean over the classes that some rows have and some not.

    Not a number where there is no such class.
    """
    targets, probabilities = np.asarray(targets), np.asarray(probabilities)
    areas = [area_under_roc(targets == place, probabilities[:, place]) for place in range(probabilities.shape[1])]
    found = [area for area in areas if area is not None]
    return float(np.mean(found)) if found else float("nan")


def area_under_roc(own: np.ndarray, scores: np.ndarray) -> float | None:
    """Share of pairs of an own and another row that `scores` put in order, ties half; None where there is no pair.

    By ranks (Mann-Whitney), ten times as fast as along the curve, which a bootstrap feels.
    """
    from scipy.stats import rankdata

    count = int(own.sum())
    if not 0 < count < len(own):
        return None
    return float((rankdata(scores)[own].sum() - count * (count + 1) / 2) / (count * (len(own) - count)))


@lower_is_better
def calibration_error(targets: Any, probabilities: Any, bins: int = 15) -> float:
    """Expected calibration error: mean |accuracy - confidence| over `bins` of confidence (arXiv:1706.04599)."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    sure = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == np.asarray(targets)
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right, minlength=bins) - np.bincount(place, weights=sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(sure))


@higher_is_better
def quadratic_kappa(targets: Any, probabilities: Any) -> float:
    """Cohen's kappa with quadratic weights, for classes that are in order; -1 to 1."""
    from sklearn.metrics import cohen_kappa_score

    labels = np.arange(np.asarray(probabilities).shape[1])
    return float(cohen_kappa_score(targets, np.argmax(probabilities, axis=1), labels=labels, weights="quadratic"))


def confusion(targets: Any, probabilities: Any) -> list[list[int]]:
    """Rows by true class (first index) and likeliest class (second)."""
    from sklearn.metrics import confusion_matrix

    labels = np.arange(np.asarray(probabilities).shape[1])
    return confusion_matrix(targets, np.argmax(probabilities, axis=1), labels=labels).tolist()
