"""Metrics for one class per row, of (class indices, (rows, classes) probabilities)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmft.metrics import higher_is_better, lower_is_better, mean_over_rows


@lower_is_better
def logloss(targets: Any, probabilities: Any) -> float:
    """Mean negative log-likelihood in nats; as on Kaggle, clipped to [1e-15, 1 - 1e-15], then normalised."""
    # Without scikit-learn, whose checks take fifty times as long in hill climbing and the bootstrap.
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-15, 1 - 1e-15)
    clipped /= clipped.sum(axis=1, keepdims=True)
    return float(-np.log(clipped[np.arange(len(clipped)), np.asarray(targets)]).mean())


@higher_is_better
@mean_over_rows
def accuracy(targets: Any, probabilities: Any) -> Any:
    """Share of rows whose likeliest class is the true one, 0 to 1."""
    return (np.argmax(probabilities, axis=1) == np.asarray(targets)).astype(float)


@higher_is_better
def macro_f1(targets: Any, probabilities: Any) -> float:
    """Mean F1 over the classes that are true or predicted in some row, 0 to 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(targets, np.argmax(probabilities, axis=1), average="macro", zero_division=0.0))


@higher_is_better
def auc(targets: Any, probabilities: Any) -> float:
    """Area under the ROC curve, one class against the rest, mean over the classes that some but not all rows have.

    NaN without such a class.
    """
    probabilities = np.asarray(probabilities)
    areas = areas_under_roc(np.asarray(targets)[:, None] == np.arange(probabilities.shape[1]), probabilities)
    return float(np.mean(areas)) if areas else math.nan


def areas_under_roc(truth: np.ndarray, scores: np.ndarray) -> list[float]:
    """For each class with positives and negatives the share of their pairs in the right order; ties count half.

    `truth` and `scores`: (rows, classes) bool and float. From ranks (Mann-Whitney), ten times as fast as from the
    curve, which matters in the bootstrap.
    """
    from scipy.stats import rankdata

    areas = []
    for positive, column in zip(truth.T, scores.T, strict=True):
        count, others = int(positive.sum()), int((~positive).sum())
        if count and others:
            areas.append(float((rankdata(column)[positive].sum() - count * (count + 1) / 2) / (count * others)))
    return areas


@lower_is_better
def calibration_error(targets: Any, probabilities: Any, bins: int = 15) -> float:
    """Expected calibration error: mean |accuracy - confidence| over `bins` of confidence (arXiv:1706.04599)."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == np.asarray(targets)
    bin_index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    hits, sums = (np.bincount(bin_index, weights=each, minlength=bins) for each in (correct, confidence))
    return float(np.abs(hits - sums).sum() / len(confidence))


@higher_is_better
def quadratic_kappa(targets: Any, probabilities: Any) -> float:
    """Cohen's kappa with quadratic weights for ordered classes, -1 to 1."""
    from sklearn.metrics import cohen_kappa_score

    labels = np.arange(np.asarray(probabilities).shape[1])
    return float(cohen_kappa_score(targets, np.argmax(probabilities, axis=1), labels=labels, weights="quadratic"))


def confusion(targets: Any, probabilities: Any) -> list[list[int]]:
    """Rows by true class (first index) and likeliest class (second)."""
    from sklearn.metrics import confusion_matrix

    labels = np.arange(np.asarray(probabilities).shape[1])
    return confusion_matrix(targets, np.argmax(probabilities, axis=1), labels=labels).tolist()
