"""Chance: the score of a constant prediction that is made from the training rows' targets only.

For classes it is each class's share of the training rows, for numbers the mean. A model that is no better has learned
nothing from its rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmft.config.task import TaskType
from llmft.metrics.intervals import mean_interval
from llmft.runs.predictions import TEXT, Predictions

SMALLEST = 1e-15


def prior_of(problem: TaskType, num_labels: int, targets: Sequence[Any]) -> list[float]:
    """Each class's share of `targets`, or their mean; a class without targets counts as having one."""
    if problem is TaskType.single_label:
        counts = Counter(targets)
        rows_per_class = [max(1, counts[label]) for label in range(num_labels)]
        return [count / sum(rows_per_class) for count in rows_per_class]
    return np.asarray(targets, dtype=np.float64).reshape(len(targets), -1).mean(axis=0).tolist()


def row_losses(values: np.ndarray, references: np.ndarray, problem: TaskType, scale: float = 1.0) -> np.ndarray:
    """(rows,) losses, as the objective `Classification` defines them."""
    if problem is TaskType.regression:
        return 0.5 * ((values[:, 0] - references) / scale) ** 2
    safe = np.clip(values, SMALLEST, 1 - SMALLEST)
    if problem is TaskType.multi_label:
        return -(references * np.log(safe) + (1 - references) * np.log1p(-safe)).mean(axis=1)
    return -np.log(safe[np.arange(len(safe)), references])


def is_better(chance: Mapping[str, Any]) -> bool:
    """Whether `against_prior` found predictions better than the prior by more than the rows' noise."""
    return (chance.get("low") or 0.0) > 0


def chance_sentence(chance: Mapping[str, Any]) -> str:
    """The result of `against_prior` in a sentence."""
    loss, prior, low, high = (chance[name] for name in ("loss", "prior_loss", "low", "high"))
    source = "the training rows' targets alone" if chance.get("trained", True) else "these rows' own targets"
    if loss is None or prior is None or low is None or high is None:
        return f"chance: too few rows to compare with the prior of {source}"
    verdict = "better than chance" if low > 0 else "WORSE than chance" if high < 0 else "NOT better than chance"
    gap, bounds = prior - loss, (low, high) if prior >= loss else (-high, -low)
    direction = "lower" if gap >= 0 else "higher"
    return (
        f"{verdict}: loss {loss:.4f} against {prior:.4f} from {source} ({abs(gap):.4f} {direction}, 95% interval "
        f"{bounds[0]:.4f} to {bounds[1]:.4f}; {chance['rows']:,} rows)"
    )


def against_prior(predictions: Predictions, metrics: Mapping[str, Any], scale: float = 1.0) -> dict[str, Any] | None:
    """Compares `predictions` with the prior on the same rows; returns JSON data, None for texts.

    Args:
        scale: a regression's unit of loss.

    Returns:
        metrics: the prior's value of each metric; None where a constant prediction has none.
        loss, prior_loss: mean row losses.
        low, high: 95% interval of prior_loss - loss, over groups where rows have them; None for too few rows.
        rows: their number.
        trained: whether the prior is from the training rows; else it is from these rows and slightly too good.
    """
    if predictions.problem == TEXT or not predictions.known:
        return None
    problem, references = TaskType(predictions.problem), predictions.references()
    prior_values, trained = _prior_values(predictions, problem, references)
    losses, prior_losses = (
        row_losses(predicted, references, problem, scale) for predicted in (predictions.values, prior_values)
    )
    low, high = mean_interval(prior_losses - losses, predictions.columns.get("group"))
    prior_metrics = {}
    for name, metric in metrics.items():
        try:
            prior_metrics[name] = float(metric(references, prior_values))
        except Exception:  # a user's metric may fail on a constant prediction; that must not end the run
            prior_metrics[name] = math.nan
    numbers = {"loss": float(losses.mean()), "prior_loss": float(prior_losses.mean()), "low": low, "high": high}
    return {"metrics": _finite(prior_metrics), **_finite(numbers), "rows": len(losses), "trained": trained}


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _prior_values(predictions: Predictions, problem: TaskType, references: np.ndarray) -> tuple[np.ndarray, bool]:
    """((rows, classes) each row's prior, of its fold or their mean; whether the training rows' prior is known)."""
    sources = predictions.provenance.get("sources") or []
    priors = [(source.get("fold"), source.get("prior")) for source in sources]
    num_values = predictions.values.shape[1]
    if not priors or any(not prior or len(prior) != num_values for _, prior in priors):
        prior_here = prior_of(problem, num_values, references.tolist())
        return np.tile(prior_here, (len(references), 1)), False
    of_fold: dict[Any, list[list[float]]] = {}
    for fold, prior in priors:
        of_fold.setdefault(fold, []).append(prior)
    mean = np.mean([prior for _, prior in priors], axis=0)
    folds = predictions.columns.get("fold") or [None] * len(references)
    return np.asarray([np.mean(of_fold[fold], axis=0) if fold in of_fold else mean for fold in folds]), True
